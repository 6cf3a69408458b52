"""What each Triton kernel must compute, against float64; raises AssertionError where it does not.

The tests and the planted bugs of triton_mutants.py run the same checks.  Kernels are imported by
the call, so that a mutant's copy is found.
"""

import os
from importlib import import_module

import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
RANKS = (1, 3, 16, 24, 64, 200)
# Rows and columns: below one block, off every block, whole blocks; columns % 4 is 0, 1, 2 and 3.
SHAPES = ((1, 5), (7, 33), (70, 130), (64, 128), (131, 67))
DROPOUT, SEED = 0.3, -987654321
SINGLE = 2e-6  # of the norm: float32 arithmetic of another order


def kernel(name):
    return import_module(f"decomp_kernels.kernels.triton.{name}")


def tensor(*size, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype).to(DEVICE)


def mask(rows, cols):
    return keep_mask(torch.tensor(SEED), (rows, cols), DROPOUT).to(DEVICE)


def agree(actual, eager, exact, name, single):
    """As good as PyTorch in the same dtypes; a float32 result, to float32's precision."""
    assert actual.shape == exact.shape, name
    if single:
        assert relative_error(actual, exact) < SINGLE, (name, relative_error(actual, exact))
    else:
        assert_as_good_as(actual, eager, exact, name)


def down_projection(dtype, r, shape, scaled, dropping):
    base, adapter = DTYPES[dtype]
    M, K = shape
    x, A = tensor(M, K, dtype=base, seed=1), tensor(r, K, dtype=adapter, seed=2)
    s = tensor(K, dtype=torch.float32, seed=3) if scaled else None
    kept = mask(M, K) if dropping else None
    seed = torch.tensor(SEED, device=DEVICE) if dropping else None
    t = kernel("down_projection").down_projection(x, A, s, seed, DROPOUT if dropping else 0.0)

    def formula(x, A):
        A = A if s is None else (A * s.to(A.dtype))
        x = x if kept is None else x * kept
        return x @ A.T / (kept_fraction(DROPOUT) if dropping else 1.0)

    assert t.dtype == adapter
    exact = formula(x.double(), A.double())
    agree(t, formula(x.to(adapter), A), exact, "t", adapter == torch.float32)


def up_expansion(dtype, r, shape, started, dropping):
    base, adapter = DTYPES[dtype]
    M, C = shape
    v, small = tensor(M, r, dtype=adapter, seed=1), tensor(C, r, dtype=adapter, seed=2).T
    if dropping:
        small = small.contiguous()
    bias = tensor(C, dtype=base, seed=3) if started else None
    addend = tensor(M, C, dtype=base, seed=4) if started else None
    kept = mask(M, C) if dropping else None
    out = kernel("up_expansion").up_expansion(
        v, small, base, bias=bias, addend=addend,
        seed=torch.tensor(SEED, device=DEVICE) if dropping else None,
        dropout=DROPOUT if dropping else 0.0,
    )  # fmt: skip

    def formula(v, small, cast):
        out = v @ small
        out = out if kept is None else out * kept
        return out if bias is None else out + bias.to(cast) + addend.to(cast)

    assert out.dtype == base
    exact = formula(v.double(), small.double(), torch.float64)
    agree(out, formula(v, small, adapter).to(base), exact, "out", base == torch.float32)
    if kept is not None:
        assert torch.equal(out != 0, kept), "dropped elements are zero and no others"


def split_products():
    """Float32 adapters in front of a bf16 result lose nothing but that result's rounding."""
    r, M, C = 24, 70, 130
    v, small = tensor(M, r, dtype=torch.float32, seed=1), tensor(r, C, dtype=torch.float32, seed=2)
    out = kernel("up_expansion").up_expansion(v, small, torch.bfloat16).double()
    exact = v.double() @ small.double()
    dropped = 2**-15 * (v.double().abs() @ small.double().abs())  # the product of two low parts
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + dropped).all()


def column_walk(dtype, r, shape, dropping):
    base, adapter = DTYPES[dtype]
    M, N = shape
    big, other = tensor(M, N, dtype=base, seed=1), tensor(M, N, dtype=base, seed=2)
    right, left = tensor(N, r, dtype=adapter, seed=3), tensor(M, r, dtype=adapter, seed=4)
    kept = mask(M, N) if dropping else None
    found = kernel("column_walk").column_walk(
        big, right=right, left=left, other=other, column_sum=True,
        seed=torch.tensor(SEED, device=DEVICE) if dropping else None,
        dropout=DROPOUT if dropping else 0.0,
    )  # fmt: skip
    wide = big.double() if kept is None else big.double() * kept
    exact = (
        wide @ right.double(),
        left.double().T @ wide,
        wide.sum(0),
        (wide * other.double()).sum(0),
    )
    for name, actual, truth in zip("ucsp", found, exact, strict=True):
        assert actual.dtype == torch.float32
        agree(actual, None, truth, name, single=True)


def row_norm(dtype, r, shape):
    base, adapter = DTYPES[dtype]
    N, K = shape
    W, A = tensor(N, K, dtype=base, seed=1), tensor(r, K, dtype=adapter, seed=2)
    B, d_norm = tensor(N, r, dtype=adapter, seed=3), tensor(N, dtype=torch.float32, seed=4)
    squared = W.double().square().sum(1).float()
    norm = kernel("row_norm").forward(W, squared, A, B, 0.7)
    grads = kernel("row_norm").backward(d_norm, norm, W, A, B, 0.7)
    exact = [t.double().requires_grad_() for t in (A, B)]
    truth = torch.linalg.vector_norm(W.double() + 0.7 * (exact[1] @ exact[0]), dim=1)
    exact_grads = torch.autograd.grad(truth, exact, d_norm.double())
    for name, actual, true in zip(
        ("norm", "down", "up"), (norm, *grads), (truth, *exact_grads), strict=True
    ):
        agree(actual, None, true, name, single=True)


def operator(dtype, dropping, impl="triton:passes"):
    """Forward and every gradient through the composition, beside the library composition."""
    from decomp_kernels.ops.decomposed_linear import decomposed_linear

    base, adapter = DTYPES[dtype]
    M, K, N, r = 37, 30, 41, 5
    sizes = {
        "x": ((M, K), base), "weight": ((N, K), base), "bias": ((N,), base),
        "down": ((r, K), adapter), "up": ((N, r), adapter), "core": ((r,), torch.float32),
        "in_scale": ((K,), torch.float32), "out_scale": ((N,), torch.float32),
        "addend": ((M, N), base),
    }  # fmt: skip
    given = {
        name: tensor(*size, dtype=kind, seed=number).requires_grad_()
        for number, (name, (size, kind)) in enumerate(sizes.items())
    }
    dy = tensor(M, N, dtype=base, seed=20)
    options = {"scale": 0.7, "activation": "gelu", "dropout": DROPOUT if dropping else 0.0}
    options["seed"] = torch.tensor(SEED, device=DEVICE)

    def outcome(impl, tensors, dy):
        y = decomposed_linear(**tensors, **options, impl=impl)
        return (y, *torch.autograd.grad(y, list(tensors.values()), dy))

    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    for name, *values in zip(
        ("y", *given),
        outcome(impl, given, dy),
        outcome("aten", given, dy),
        outcome("reference", wide, dy.double()),
        strict=True,
    ):
        assert_as_good_as(*values, name, base)
