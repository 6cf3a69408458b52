"""What the fused Triton kernels must compute, against float64; as triton_checks.py for others."""

from contextlib import contextmanager

import torch
from triton_checks import DEVICE, DROPOUT, DTYPES, SEED, agree, kernel, mask, tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels import columns

TERMS = ("rank", "in_scale", "out_scale", "bias", "addend")


@contextmanager
def architecture(name):
    """Inside, the shipped configurations are those for ``name``, and new memory is NaN."""
    own = dispatch.architecture
    dispatch.architecture = lambda device: name
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        dispatch.architecture = own
        torch.use_deterministic_algorithms(False)


def forward(dtype, r, sizes, terms=TERMS, arch="any"):
    """y and z; sizes is (M, K, N)."""
    base, adapter = DTYPES[dtype]
    M, K, N = sizes
    x, W = tensor(M, K, dtype=base, seed=1), tensor(N, K, dtype=base, seed=2)
    given = {
        "v": tensor(M, r, dtype=adapter, seed=3), "up": tensor(N, r, dtype=adapter, seed=4),
        "in_scale": tensor(K, dtype=torch.float32, seed=5),
        "out_scale": tensor(N, dtype=torch.float32, seed=6),
        "bias": tensor(N, dtype=base, seed=7), "addend": tensor(M, N, dtype=base, seed=8),
    }  # fmt: skip
    given = {k: t for k, t in given.items() if ("rank" if k in ("v", "up") else k) in terms}
    with architecture(arch):
        y, z = kernel("fused_forward").fused_forward(x, W, **given, scale=0.7, keep_z=True)

    def formula(x, W, cast, v=None, up=None, in_scale=None, out_scale=None, bias=None, addend=None):
        X = x if in_scale is None else columns.scale_columns(x, in_scale)
        z = X @ W.T
        z = z if v is None else z + (0.7 * (v @ up.T)).to(cast)
        z = z if addend is None else z + addend
        y = z if out_scale is None else columns.scale_columns(z, out_scale)
        return y if bias is None else y + bias, z

    eager = formula(x, W, base, **given)
    exact = formula(x.double(), W.double(), None, **{k: t.double() for k, t in given.items()})
    for name, *found in zip("yz", (y, z), eager, exact, strict=True):
        assert found[0].dtype == base
        agree(*found, name, base == torch.float32)


def input_gradient(dtype, r, sizes, terms=TERMS, dropping=False, arch="any"):
    """d_x and d_in_scale; sizes is (M, K, N)."""
    base, adapter = DTYPES[dtype]
    M, K, N = sizes
    dy, W = tensor(M, N, dtype=base, seed=1), tensor(N, K, dtype=base, seed=2)
    given = {
        "dt": tensor(M, r, dtype=adapter, seed=3), "down": tensor(r, K, dtype=adapter, seed=4),
        "in_scale": tensor(K, dtype=torch.float32, seed=5), "x": tensor(M, K, dtype=base, seed=6),
        "out_scale": tensor(N, dtype=torch.float32, seed=7),
    }  # fmt: skip
    term = {"dt": "rank", "down": "rank", "x": "in_scale"}
    given = {k: t for k, t in given.items() if term.get(k, k) in terms}
    kept = mask(M, K) if dropping else None
    with architecture(arch):
        d_x, d_in = kernel("fused_input_gradient").fused_input_gradient(
            dy, W, **given,
            seed=torch.tensor(SEED, device=DEVICE) if dropping else None,
            dropout=DROPOUT if dropping else 0.0,
        )  # fmt: skip

    def formula(dy, W, cast, dt=None, down=None, in_scale=None, x=None, out_scale=None):
        g = dy if out_scale is None else columns.scale_columns(dy, out_scale)
        d_X = g @ W
        if dt is not None:
            part = (dt @ down).to(cast)
            d_X = d_X + (part if kept is None else part * kept)
        if in_scale is None:
            return d_X, None
        wide = x.double() if cast is None else x.float()
        return columns.scale_columns(d_X, in_scale), (wide * d_X).sum(0)

    eager = formula(dy, W, base, **given)
    exact = formula(dy.double(), W.double(), None, **{k: t.double() for k, t in given.items()})
    assert d_x.dtype == base
    agree(d_x, eager[0], exact[0], "d_x", base == torch.float32)
    assert (d_in is None) == (exact[1] is None)
    if d_in is not None:
        assert d_in.dtype == torch.float32
        agree(d_in, eager[1], exact[1], "d_in_scale", base == torch.float32)
