"""Calls of tests/native/hopper_emulation.cpp: the Hopper product on the host, box by box.

Operands are small whole numbers, so every float32 sum is exact and the one rounding at the store is
all there is: results are compared bit for bit.  Each operand lies in a larger buffer of NaN, so
that an extent or a coordinate too far is seen and not only read.
"""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decomp_kernels.reference import decomposed_linear as reference
from decomp_kernels.reference.dropout import keep_mask, kept_fraction, threshold

ROOT = Path(__file__).resolve().parents[2]
COMMON = ROOT / "csrc" / "common"
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
SHAPES = {"ping-pong 64x128": 0, "ping-pong 64x256": 1, "cooperative 128x128": 2,
          "cooperative 128x256": 3}  # fmt: skip
FORWARD, INPUT_GRADIENT = 0, 1
SMS = 6  # few processors, so that each takes several tiles


def build(folder: Path, headers: Path = COMMON, *options: str) -> ctypes.CDLL:
    library = folder / "hopper_emulation.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", *options, "-shared", "-fPIC", "-pthread",
         f"-I{headers}", str(Path(__file__).with_name("hopper_emulation.cpp")), "-o", str(library)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.hopper_forward_why_not.restype = ctypes.c_char_p
    loaded.hopper_input_gradient_why_not.restype = ctypes.c_char_p
    loaded.hopper_choose_shape.argtypes = [
        ctypes.c_int,
        *[ctypes.c_int64] * 3,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    return loaded


def compiler() -> str | None:
    return shutil.which("g++")


def _structure(pointers: str, sizes: str, tail: list[tuple[str, type]], after: str = "") -> type:
    fields = [(name, ctypes.c_void_p) for name in pointers.split()]
    if after:  # threshold stands among the pointers
        at = [name for name, _ in fields].index(after) + 1
        fields.insert(at, ("threshold", ctypes.c_uint32))
    fields += [(name, ctypes.c_int64) for name in sizes.split()]
    return type("Args", (ctypes.Structure,), {"_fields_": fields + tail})


_TAIL = [("dtype", ctypes.c_int), ("shape", ctypes.c_int)]
ForwardArgs = _structure(
    "x weight v up addend out_scale bias y z",
    "M N K r x_stride weight_stride v_stride up_stride addend_stride y_stride z_stride",
    _TAIL,
)
InputGradientArgs = _structure(
    "g weight dt down seed in_scale x d_x d_in_scale",
    "M N K r g_stride weight_stride dt_stride down_stride x_stride d_x_stride",
    _TAIL, after="seed",
)  # fmt: skip


@dataclass
class Case:
    shape: int
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    dropout: float = 0.0
    sms: int = SMS


def whole(rows: int, cols: int, dtype: torch.dtype, bound: int = 2) -> Tensor:
    """[rows, cols] of whole numbers in a buffer of NaN: rows 16 bytes apart, some rows more."""
    stride = (cols + 7) // 8 * 8 + 64
    buffer = torch.full((rows + 300, stride), float("nan"), dtype=dtype)
    buffer[:rows, :cols] = torch.randint(-bound, bound + 1, (rows, cols)).to(dtype)
    return buffer[:rows, :cols]


def scales(size: int) -> Tensor:
    """Powers of two: products with them are exact."""
    return torch.exp2(torch.randint(-2, 3, (size,)).float())


def _put(args: ctypes.Structure, name: str, t: Tensor | None) -> None:
    setattr(args, name, None if t is None else t.data_ptr())
    if t is not None and hasattr(args, f"{name}_stride"):
        setattr(args, f"{name}_stride", t.stride(0))


def arguments(kind: type, case: Case, tensors: dict[str, Tensor | None]) -> ctypes.Structure:
    args = kind(M=case.M, N=case.N, K=case.K, r=case.r, dtype=DTYPES[case.dtype], shape=case.shape)
    for name, t in tensors.items():
        _put(args, name, t)
    return args


def _same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0, equal_nan=False)


def check_forward(library: ctypes.CDLL, case: Case) -> None:
    M, N, K, r, dtype = case.M, case.N, case.K, case.r, case.dtype
    has = case.options.__contains__
    x, weight = whole(M, K, dtype), whole(N, K, dtype)
    down, up = (whole(r, K, dtype, 1), whole(N, r, dtype)) if r else (None, None)
    addend = whole(M, N, dtype, 9) if has("addend") else None
    out_scale = scales(N) if has("out_scale") else None
    bias = torch.randint(-9, 10, (N,)).float() if has("bias") else None
    v = None
    if down is not None:
        v = whole(M, r, dtype)
        v.copy_((x.double() @ down.double().T).clamp(-99, 99))
    y, z = whole(M, N, dtype), whole(M, N, dtype) if has("z") else None
    tensors = {"x": x, "weight": weight, "v": v, "up": up, "addend": addend,
               "out_scale": out_scale, "bias": bias, "y": y, "z": z}  # fmt: skip
    args = arguments(ForwardArgs, case, tensors)
    assert library.hopper_forward_why_not(ctypes.byref(args), 90) is None
    assert library.hopper_forward(ctypes.byref(args), case.sms) == 0

    # The reference makes v itself: the identity as down, and v's columns after x's.
    wide = [None if t is None else t.double() for t in (x, weight, bias, v, up, out_scale, addend)]
    x_, weight_, bias_, v_, up_, out_scale_, addend_ = wide
    low = None if v_ is None or up_ is None else v_ @ up_.T
    low = low if addend_ is None else addend_ if low is None else low + addend_
    want_y, _, want_z = reference.forward(
        x_, weight_, bias_, None, None, None, None, out_scale_, low, None, 1.0, 0.0, "identity",
        True,
    )  # fmt: skip
    _same(y, want_y)
    if z is not None:
        _same(z, want_z)


def check_input_gradient(library: ctypes.CDLL, case: Case) -> None:
    M, N, K, r, dtype = case.M, case.N, case.K, case.r, case.dtype
    has = case.options.__contains__
    g, weight = whole(M, N, dtype), whole(N, K, dtype)
    down, dt = (whole(r, K, dtype), whole(M, r, dtype, 9)) if r else (None, None)
    seed = torch.tensor(-(2**62) - 12345) if case.dropout else None
    in_scale = scales(K) if has("in_scale") else None
    summed = has("d_in_scale")
    x = whole(M, K, dtype) if summed else None
    d_x = None if has("no d_x") else whole(M, K, dtype)
    d_in_scale = torch.full((K,), float("nan")) if summed else None
    tensors = {"g": g, "weight": weight, "dt": dt, "down": down, "seed": seed,
               "in_scale": in_scale, "x": x, "d_x": d_x, "d_in_scale": d_in_scale}  # fmt: skip
    args = arguments(InputGradientArgs, case, tensors)
    args.threshold = threshold(case.dropout)
    assert library.hopper_input_gradient_why_not(ctypes.byref(args), 90) is None
    assert library.hopper_input_gradient(ctypes.byref(args), case.sms) == 0

    d_X = g.double() @ weight.double()
    if dt is not None and down is not None:
        low = dt.double() @ down.double()
        d_X += low if seed is None else low * keep_mask(seed, (M, K), case.dropout)
    if d_x is not None:
        _same(d_x, d_X if in_scale is None else d_X * in_scale.double())
    if d_in_scale is not None and x is not None:
        _same(d_in_scale, (x.double() * d_X).sum(0))


def check_backward(library: ctypes.CDLL, case: Case) -> None:
    """d_x and d_in_scale of reference.backward, dropout and scales included; p = 1/2 is exact."""
    M, N, K, r, dtype = case.M, case.N, case.K, case.r, case.dtype
    dy, weight, down = whole(M, N, dtype), whole(N, K, dtype), whole(r, K, dtype)
    up, x, d_x = whole(N, r, dtype), whole(M, K, dtype), whole(M, K, dtype)
    up.copy_(up * (torch.rand(N, r) < 0.1))  # few, so that dt is exact in bfloat16
    in_scale, out_scale = scales(K), torch.randint(1, 3, (N,)).float()
    seed, p, d_in_scale = torch.tensor(77), case.dropout, torch.empty(K)
    need = (True, False, False, False, False, False, True, False, False)
    wide = [t.double() for t in (dy, x, weight, down, up, in_scale, out_scale)]
    dy_, x_, weight_, down_, up_, in_scale_, out_scale_ = wide
    want = reference.backward(
        dy_, x_, weight_, None, down_, up_, None, in_scale_, out_scale_, None, None, seed, 1.0, p,
        "identity", need,
    )  # fmt: skip
    g, dt = whole(M, N, dtype), whole(M, r, dtype)
    g.copy_(dy_ * out_scale_)
    dt.copy_((dy_ * out_scale_) @ up_ / kept_fraction(p))
    tensors = {"g": g, "weight": weight, "dt": dt, "down": down, "seed": seed,
               "in_scale": in_scale, "x": x, "d_x": d_x, "d_in_scale": d_in_scale}  # fmt: skip
    args = arguments(InputGradientArgs, case, tensors)
    args.threshold = threshold(p)
    assert library.hopper_input_gradient(ctypes.byref(args), case.sms) == 0
    _same(d_x, want.x)
    _same(d_in_scale, want.in_scale)
