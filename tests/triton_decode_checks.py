"""What kernels/triton/decode.py must compute, against float64; AssertionError where it does not."""

import torch
from triton_checks import DEVICE, DTYPES, SINGLE, agree, kernel, tensor

from decomp_kernels.reference import decomposed_linear as reference
from decomp_kernels.testing import relative_error

# (M, K, N): below one block, off every block, whole blocks; more than one share and one strip.
SHAPES = ((1, 5, 3), (3, 33, 130), (16, 256, 128), (13, 300, 67), (2, 1100, 40))
RANKS = (1, 3, 16, 24, 64, 200)
TERMS = ("bias", "core", "in_scale", "out_scale", "addend")


def make(dtype, r, shape, terms=TERMS, branch=True):
    """The arguments of ``decode`` before scale and activation."""
    base, adapter = DTYPES[dtype]
    M, K, N = shape
    made = {
        "x": tensor(M, K, dtype=base, seed=1),
        "weight": (tensor(N, K, dtype=torch.float64, seed=2) / K**0.5).to(base),
        "bias": tensor(N, dtype=base, seed=3),
        "down": (tensor(r, K, dtype=torch.float64, seed=4) / K**0.5).to(adapter),
        "up": (tensor(N, r, dtype=torch.float64, seed=5) / r**0.5).to(adapter),
        "core": tensor(r, dtype=torch.float32, seed=6),
        "in_scale": tensor(K, dtype=torch.float32, seed=7),
        "out_scale": tensor(N, dtype=torch.float32, seed=8),
        "addend": tensor(M, N, dtype=base, seed=9),
    }
    wanted = ("x", "weight", *terms, *(("down", "up") if branch else ()))
    return {name: value if name in wanted else None for name, value in made.items()}


def exact(given, scale, activation):
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    return reference.forward(
        **wide, seed=None, scale=scale, dropout=0.0, activation=activation, keep_z=True
    )


def eager(given, scale, activation):
    """The terms by PyTorch in their own dtypes, one after the other."""
    g = given
    cast = g["x"].dtype
    X = g["x"] if g["in_scale"] is None else (g["x"] * g["in_scale"]).to(cast)
    z, t = X @ g["weight"].T, None
    if g["down"] is not None:
        A = g["down"] if g["in_scale"] is None else g["down"] * g["in_scale"]
        t = g["x"].to(g["down"].dtype) @ A.to(g["down"].dtype).T
        v = reference.activate(t, activation)
        v = v if g["core"] is None else (v * g["core"]).to(v.dtype)
        z = z + (scale * (v @ g["up"].T)).to(cast)
    z = z if g["addend"] is None else z + g["addend"]
    y = z if g["out_scale"] is None else (z * g["out_scale"]).to(cast)
    return y if g["bias"] is None else y + g["bias"], t, z


def decode(dtype, r, shape, terms=TERMS, branch=True, activation="gelu", scale=0.7):
    base, adapter = DTYPES[dtype]
    given = make(dtype, r, shape, terms, branch)
    found = kernel("decode").decode(**given, scale=scale, activation=activation)
    assert (found[1] is not None) == branch
    assert (found[2] is not None) == ("out_scale" in terms)
    for name, actual, plain, truth in zip(
        "ytz", found, eager(given, scale, activation), exact(given, scale, activation), strict=True
    ):
        if actual is not None:
            kind = adapter if name == "t" else base
            assert actual.dtype == kind, name
            agree(actual, plain, truth, name, kind == torch.float32)


def activations():
    """phi alone, from 1e-6 to 20 and back, at float32's precision for each element."""
    x = torch.logspace(-6, 0, 8, device=DEVICE)
    x = torch.cat((x, -x))[:, None]
    down = torch.logspace(0, 1.3, 16, device=DEVICE)[:, None]
    nothing, eye = torch.zeros(16, 1, device=DEVICE), torch.eye(16, device=DEVICE)
    for activation in ("identity", "relu", "silu", "gelu", "tanh"):
        y, t, _ = kernel("decode").decode(
            x, nothing, None, down, eye, None, None, None, None, 1.0, activation
        )
        assert torch.equal(t, x * down.T)
        truth = reference.activate(t.double(), activation)
        floor = 2.0**-23 * t.double().abs()  # what 1 + erf(t) and the like lose far left of 0
        assert ((y - truth).abs() <= 2**-20 * truth.abs() + floor).all(), activation


def gaps():
    """Rows that are not neighbours are read in place, and nothing between them is."""
    given = make("fp32", 24, (3, 70, 41))
    apart = dict(given)
    for name in ("x", "weight", "down", "up"):
        wide = torch.full((len(given[name]), given[name].shape[1] + 5), float("nan"), device=DEVICE)
        wide[:, :-5] = given[name]
        apart[name] = wide[:, :-5]
    apart["addend"] = given["addend"].T.contiguous().T
    columns = {name: given[name].T.contiguous().T for name in ("x", "weight", "down", "up")}
    expected = kernel("decode").decode(**given, scale=0.7, activation="relu")
    for other in (apart, given | columns):
        found = kernel("decode").decode(**other, scale=0.7, activation="relu")
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def cancelling_terms():
    """Large terms that cancel: nothing is rounded to the base's dtype on the way to y."""
    given = make("bf16-fp32", 8, (5, 64, 40), terms=("addend",))
    plain = exact(given | {"addend": None}, 0.7, "identity")[0]
    given["addend"] = -plain.to(torch.bfloat16)
    y = kernel("decode").decode(**given, scale=0.7, activation="identity")[0]
    assert relative_error(y, exact(given, 0.7, "identity")[0]) < 2**-8


def branch_precision():
    """Float32 adapters on a bf16 base: t has float32's precision under in_scale too."""
    given = make("bf16-fp32", 24, (7, 300, 40))
    _, t, _ = kernel("decode").decode(**given, scale=0.7, activation="tanh")
    assert relative_error(t, exact(given, 0.7, "tanh")[1]) < SINGLE
