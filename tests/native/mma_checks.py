"""What the mma.sync kernels must compute, against float64: csrc/cuda/mma_arguments.h's formulas.

The kernels' source runs on the host (mma_emulation.cpp); arguments go as csrc's own structs.
"""

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_uint32, c_void_p

import torch
from emulator import EmulationError
from torch import Tensor

from decomp_kernels.reference import decomposed_linear
from decomp_kernels.reference.dropout import keep_mask, threshold
from decomp_kernels.testing import assert_as_good_as

DTYPES = {"bf16": (torch.bfloat16, 1), "fp16": (torch.float16, 2)}
TILES = {"small": (0, (64, 128)), "square": (1, (128, 128)), "wide": (2, (128, 256))}
SEED, DROPOUT = 123456789, 0.3
FILL = 77.0  # of what lies between the rows of an output


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Vector(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


SIZES = [("dtype", c_int), ("M", c_int64), ("N", c_int64), ("K", c_int64), ("r", c_int64)]


class Forward(Structure):
    _fields_ = [
        *SIZES,
        *((name, Matrix) for name in ("x", "weight", "v", "up", "addend")),
        *((name, Vector) for name in ("out_scale", "bias")),
        *((name, Matrix) for name in ("y", "z")),
    ]


class InputGradient(Structure):
    _fields_ = [
        *SIZES,
        *((name, Matrix) for name in ("g", "weight", "dt", "down", "x")),
        ("in_scale", Vector), ("seed", POINTER(c_int64)), ("dropout_threshold", c_uint32),
        ("d_x", Matrix), ("d_in_scale", POINTER(c_float)),
    ]  # fmt: skip


def arguments(kind: type, dtype: torch.dtype, sizes: dict[str, int], tensors: dict[str, Tensor]):
    """csrc's struct; every tensor that is not there is null."""
    made = kind(dtype=code(dtype), **sizes)
    for name, field in kind._fields_:
        t = tensors.get(name)
        if t is None:
            continue
        if field is Matrix:
            setattr(made, name, Matrix(t.data_ptr(), t.stride(0)))
        elif field is Vector:
            setattr(made, name, Vector(t.data_ptr(), code(t.dtype)))
        else:
            setattr(made, name, ctypes.cast(t.data_ptr(), field))
    return made


def code(dtype: torch.dtype) -> int:
    return next((c for d, c in DTYPES.values() if d == dtype), 0)


def run(library, name: str, made: Structure, tile: str, order: int, shift: int = 0) -> None:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    choice, _ = TILES[tile]
    message = function(byref(made), choice, ctypes.c_uint64(order), shift)
    if message is not None:
        raise EmulationError(message.decode())


def matrix(rows: int, cols: int, dtype, seed: int, padding: int = 0) -> Tensor:
    """[rows, cols] with ``padding`` more elements from row to row, which are NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) / 2
    whole = torch.full((rows, cols + padding), torch.nan, dtype=dtype)
    whole[:, :cols] = values.to(dtype)
    return whole[:, :cols]


def output(rows: int, cols: int, dtype, padding: int = 0) -> Tensor:
    return torch.full((rows, cols + padding), FILL, dtype=dtype)[:, :cols]


def gaps_are_whole(t: Tensor) -> bool:
    rows, cols = t.shape
    if t.numel() == 0:
        return True
    whole = t.as_strided((rows, t.stride(0)), (t.stride(0), 1))
    return bool((whole[:, cols:] == FILL).all())


def even_rows(cols: int) -> int:
    """The padding that makes rows of 16-bit elements begin at multiples of 16 bytes."""
    return -cols % 8


def forward(
    library, dtype="bf16", sizes=(70, 50, 130), r=16, terms=(), tile="small", order=0,
    padding=even_rows, shift=0, vectors=torch.float32,
):  # fmt: skip
    """(y, z) of random operands, checked.  sizes is (M, K, N)."""
    base, _ = DTYPES[dtype]
    M, K, N = sizes
    given = {
        "x": matrix(M, K, base, 1, padding(K)), "weight": matrix(N, K, base, 2, padding(K)),
        "addend": matrix(M, N, base, 3, padding(N)),
        "out_scale": matrix(1, N, vectors, 4)[0], "bias": 8 * matrix(1, N, vectors, 5)[0],
    }  # fmt: skip
    if r:
        given |= {"v": matrix(M, r, base, 6, padding(r)), "up": matrix(N, r, base, 7, padding(r))}
    given = {k: t for k, t in given.items() if k in ("x", "weight", "v", "up", *terms)}
    y = output(M, N, base, padding(N))
    z = output(M, N, base, padding(N)) if "z" in terms else None
    outputs = {"y": y} if z is None else {"y": y, "z": z}
    made = arguments(Forward, base, {"M": M, "N": N, "K": K, "r": r}, {**given, **outputs})
    run(library, "mma_forward", made, tile, order, shift)

    exact = reference_forward(**{k: t.double() for k, t in given.items()})
    eager = eager_forward(**given)
    for name, found in outputs.items():
        place = "yz".index(name)
        assert gaps_are_whole(found), f"{name}: a store between rows"
        assert_as_good_as(found, eager[place], exact[place], name)
    return y, z


def reference_forward(x, weight, v=None, up=None, addend=None, out_scale=None, bias=None):
    """(y, z) by the definition, with the rank-r product as part of its addend."""
    if v is not None:
        product = v @ up.T
        addend = product if addend is None else product + addend
    y, _, z = decomposed_linear.forward(
        x, weight, bias, None, None, None, None, out_scale, addend, None, 1.0, 0.0, "identity", True
    )
    return y, z


def eager_forward(x, weight, v=None, up=None, addend=None, out_scale=None, bias=None):
    z = x @ weight.T
    z = z if v is None else z + v @ up.T
    z = z if addend is None else z + addend
    y = z if out_scale is None else z * out_scale.to(z.dtype)
    return y if bias is None else y + bias.to(y.dtype), z


def input_gradient(
    library, dtype="bf16", sizes=(70, 130, 50), r=16, terms=("d_x",), tile="small", order=0,
    padding=even_rows, shift=0, dropping=False, vectors=torch.float32,
):  # fmt: skip
    """(d_x, d_in_scale) of random operands, checked.  sizes is (M, K, N)."""
    base, _ = DTYPES[dtype]
    M, K, N = sizes
    given = {
        "g": matrix(M, N, base, 1, padding(N)), "weight": matrix(N, K, base, 2, padding(K)),
        "x": matrix(M, K, base, 3, padding(K)), "in_scale": matrix(1, K, vectors, 4)[0],
    }  # fmt: skip
    if r:
        given |= {
            "dt": 4 * matrix(M, r, base, 5, padding(r)), "down": matrix(r, K, base, 6, padding(K))
        }  # fmt: skip
    used = {"d_in_scale": ("x", "in_scale")}.get("d_in_scale" if "d_in_scale" in terms else "", ())
    given = {
        k: t for k, t in given.items() if k in ("g", "weight", "dt", "down", *used, *terms)
    }  # fmt: skip
    seed = torch.tensor(SEED)
    d_x = output(M, K, base, padding(K)) if "d_x" in terms else None
    d_in = torch.empty(K) if "d_in_scale" in terms else None
    extra = {"d_x": d_x, "d_in_scale": d_in, "seed": seed if dropping else None}
    sized = {
        "M": M, "N": N, "K": K, "r": r, "dropout_threshold": threshold(DROPOUT) if dropping else 0
    }  # fmt: skip
    made = arguments(InputGradient, base, sized, {**given, **extra})
    run(library, "mma_input_gradient", made, tile, order, shift)

    kept = keep_mask(seed, (M, K), DROPOUT) if dropping else None
    eager = gradient_formula(**given, kept=kept)
    exact = gradient_formula(**{k: t.double() for k, t in given.items()}, kept=kept)
    if d_x is not None:
        assert gaps_are_whole(d_x), "d_x: a store between rows"
        assert_as_good_as(d_x, eager[0], exact[0], "d_x")
    if d_in is not None:
        assert_as_good_as(d_in, eager[1], exact[1], "d_in_scale")
    return d_x, d_in


def gradient_formula(g, weight, dt=None, down=None, x=None, in_scale=None, kept=None):
    d_X = g @ weight
    if dt is not None:
        part = dt @ down
        d_X = d_X + (part if kept is None else part * kept)
    d_in = None if x is None else (x.to(torch.promote_types(x.dtype, torch.float32)) * d_X).sum(0)
    return d_X if in_scale is None else d_X * in_scale.to(d_X.dtype), d_in


def whole_backward(library, tile="small", order=0):
    """d_x and d_in_scale of small whole numbers are those of the definition, bit for bit."""
    M, K, N, r, p = 70, 135, 40, 5, 0.5
    generator = torch.Generator().manual_seed(9)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=generator).double()

    x, W, A, B, dy = whole(M, K), whole(N, K), whole(r, K), whole(N, r), whole(M, N)
    seed, in_scale = torch.tensor(SEED), 2.0 ** whole(K)
    needs = decomposed_linear.Gradients(*(n in ("x", "in_scale") for n in NAMES))
    exact = decomposed_linear.backward(
        dy, x, W, None, A / in_scale, B, None, in_scale, None, None, None, seed, 0.25, p,
        "identity", needs,
    )  # fmt: skip
    base = torch.bfloat16
    dt = 0.25 * (dy @ B) / 0.5
    given = {
        "g": dy.to(base), "weight": W.to(base), "dt": dt.to(base), "x": x.to(base),
        "down": (A / in_scale).to(base), "in_scale": in_scale.float(), "seed": seed,
        "d_x": output(M, K, base), "d_in_scale": torch.empty(K),
    }  # fmt: skip
    assert torch.equal(given["dt"].double(), dt)  # bf16 holds them
    sized = {"M": M, "N": N, "K": K, "r": r, "dropout_threshold": threshold(p)}
    made = arguments(InputGradient, base, sized, given)
    run(library, "mma_input_gradient", made, tile, order)
    assert torch.equal(given["d_x"], exact.x.to(base))
    assert torch.equal(given["d_in_scale"], exact.in_scale.float())


NAMES = decomposed_linear.Gradients._fields
