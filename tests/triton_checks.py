"""What each Triton kernel must compute, against float64; raises AssertionError where it does not.

The tests and the planted bugs of triton_mutants.py run the same checks.  Kernels are imported by
the call, so that a mutant's copy is found.
"""

import os
from importlib import import_module

import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from decomp_kernels.reference.decomposed_linear import activate
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
    return torch.randn(size, generator=gen, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


def mask(rows, cols, seed=SEED, dropout=DROPOUT):
    return keep_mask(torch.tensor(seed), (rows, cols), dropout).to(DEVICE)


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


def down_projections(dtype, r, shape, keep_t=True, count=3):
    """Adapters on one x, each with its own rank, mask, scales and phi."""
    base, adapter = DTYPES[dtype]
    M, K = shape
    x = tensor(M, K, dtype=base, seed=1)
    of = kernel("down_projection").Adapter
    given = [
        of(
            tensor(rank, K, dtype=adapter, seed=2 + i),
            tensor(K, dtype=torch.float32, seed=10 + i) if i in (0, 3) else None,
            torch.tensor(SEED + i, device=DEVICE) if p else None,
            p,
            tensor(rank, dtype=torch.float32, seed=20 + i) if i in (0, 4) else None,
            scale,
            activation,
        )
        for i, (rank, p, scale, activation) in enumerate(
            (
                (r, DROPOUT, 0.7, "gelu"),
                (5, 0.5, 1.0, "identity"),
                (max(1, r // 2), 0.0, 1.3, "tanh"),
                (1, DROPOUT, 1.0, "relu"),
                (3, 0.0, 2.0, "silu"),
            )[:count]
        )
    ]
    found = kernel("down_projection").down_projections(x, given, keep_t=keep_t)

    def formula(one, x, A):
        A = A if one.in_scale is None else A * one.in_scale.to(A.dtype)
        if one.dropout:
            x = x * mask(M, K, int(one.seed), one.dropout) / kept_fraction(one.dropout)
        t = x @ A.T
        v = activate(t, one.activation) * one.scale
        return t, v if one.core is None else v * one.core.to(t.dtype)

    for one, pair in zip(given, found, strict=True):
        exact = formula(one, x.double(), one.down.double())
        eager = formula(one, x.to(adapter), one.down)
        assert (pair[0] is pair[1]) == (one is given[1])
        assert keep_t or one is given[1] or pair[0] is None
        for name, actual, *both in zip("tv", pair, eager, exact, strict=True):
            if actual is not None:
                assert actual.dtype == adapter
                agree(actual, *both, f"{name} {one.activation}", adapter == torch.float32)


def activations():
    """phi to float32's precision, of arguments of every size."""
    from decomp_kernels.factors import ACTIVATIONS

    for lowest in (1e-8, 1e-5, 1e-2, 0.3, 1.0, 3.0):
        t = torch.linspace(lowest, 3 * lowest, 50, device=DEVICE)
        t = torch.stack((t, -t), 1)
        eye = torch.eye(2, device=DEVICE)
        for kind in ACTIVATIONS:
            of = kernel("down_projection").Adapter(eye, activation=kind)
            ((_, v),) = kernel("down_projection").down_projections(t, [of])
            exact = activate(t.double(), kind)
            assert_as_good_as(v, activate(t, kind), exact, f"{kind} from {lowest}")


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


def up_expansions(dtype, r, shape, count=3):
    """Branches of one sum, each with its own rank and mask."""
    base, adapter = DTYPES[dtype]
    M, C = shape
    kinds = ((r, DROPOUT), (5, 0.0), (max(1, r // 2), 0.5), (1, 0.0), (3, DROPOUT))[:count]
    given = [
        kernel("up_expansion").Expansion(
            tensor(M, rank, dtype=adapter, seed=2 * i),
            tensor(rank, C, dtype=adapter, seed=2 * i + 1),
            torch.tensor(SEED + i, device=DEVICE) if p else None,
            p,
        )
        for i, (rank, p) in enumerate(kinds)
    ]
    bias = tensor(C, dtype=base, seed=20)
    out = kernel("up_expansion").up_expansions(given, base, bias=bias)

    def formula(dtype):
        total = bias.to(dtype)
        for one in given:
            kept = mask(M, C, int(one.seed), one.dropout) if one.dropout else 1.0
            total = total + one.v.to(dtype) @ one.small.to(dtype) * kept
        return total

    agree(out, formula(adapter).to(base), formula(torch.float64), "out", base == torch.float32)


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
    wide = big.double()
    exact = (
        wide @ right.double(),
        left.double().T @ (wide if kept is None else wide * kept),
        wide.sum(0),
        (wide * other.double()).sum(0),
    )
    for name, actual, truth in zip("ucsp", found, exact, strict=True):
        assert actual.dtype == torch.float32
        agree(actual, None, truth, name, single=True)


def walk_columns(dtype, r, shape, count=3):
    """Left factors, each with its own rank and mask; another tensor, summed and scaled."""
    base, adapter = DTYPES[dtype]
    M, N = shape
    big, other = tensor(M, N, dtype=base, seed=1), tensor(M, N, dtype=base, seed=2)
    scale = tensor(N, dtype=torch.float32, seed=3)
    lefts = [
        kernel("column_walk").Left(
            tensor(M, rank, dtype=adapter, seed=10 + i),
            torch.tensor(SEED + i, device=DEVICE) if p else None,
            p,
        )
        for i, (rank, p) in enumerate(
            ((r, DROPOUT), (5, 0.0), (max(1, r // 2), 0.5), (1, DROPOUT), (3, 0.5))[:count]
        )
    ]
    found = kernel("column_walk").walk_columns(big, lefts, other=other, scale=scale)
    assert found.u is None and found.s is None
    agree(found.p, None, (big.double() * other.double()).sum(0), "p", single=True)
    exact, eager = other.double() * scale.double(), (other.float() * scale).to(base)
    assert found.scaled.dtype == base
    agree(found.scaled, eager, exact, "scaled", base == torch.float32)
    for c, one in zip(found.c, lefts, strict=True):
        kept = mask(M, N, int(one.seed), one.dropout) if one.dropout else 1.0
        agree(c, None, one.left.double().T @ (big.double() * kept), "c", single=True)


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


def operator(dtype, dropping, impl="triton:passes", rows=37):
    """Forward and every gradient through the composition, beside the library composition."""
    from decomp_kernels.ops.decomposed_linear import decomposed_linear

    base, adapter = DTYPES[dtype]
    M, K, N, r = rows, 30, 41, 5
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
