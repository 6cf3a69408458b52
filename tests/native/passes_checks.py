"""What each device pass must compute, against float64; raises AssertionError where it does not.

The tests and the planted bugs of passes_mutants.py run the same checks on libraries that
``library`` builds: the kernels' own source, run on the host by cuda_on_host.h.
"""

import torch
from emulator import call

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.reference.decomposed_linear import activate
from decomp_kernels.reference.dropout import keep_mask, kept_fraction, threshold
from decomp_kernels.testing import assert_as_good_as

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtype.h
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
DROPOUT, SEED = 0.3, -987654321


def tensor(*size, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)


def strided(M, K, extra, *, dtype, seed):
    """[M, K] whose rows begin K + extra elements apart."""
    return tensor(M, K + extra, dtype=dtype, seed=seed)[:, :K]


def mask(rows, cols):
    return keep_mask(torch.tensor(SEED), (rows, cols), DROPOUT)


def dropping(on):
    """(seed, threshold) as the kernels take them."""
    return (torch.tensor([SEED]), threshold(DROPOUT)) if on else (None, 0)


def down_projection(
    library, dtype, shape, r, *, extra=0, scaled=False, drop=False, core=False, phi="identity",
    t_dtype=None, want="tv", sms=1, order=1,
):  # fmt: skip
    base, adapter = DTYPES[dtype]
    M, K = shape
    x, A = strided(M, K, extra, dtype=base, seed=1), tensor(r, K, dtype=adapter, seed=2)
    in_scale = tensor(K, dtype=torch.float32, seed=3) if scaled else None
    e = tensor(r, dtype=torch.float32, seed=4) if core else None
    scale, kept = 1.5, mask(M, K) if drop else torch.ones(M, K, dtype=torch.bool)
    after = kept_fraction(DROPOUT) if drop else 1.0
    t = torch.empty(M, r, dtype=t_dtype or adapter) if "t" in want else None
    v = torch.empty(M, r, dtype=adapter) if "v" in want else None
    call(
        library, "run_down_projection", x, CODES[base], x.stride(0), A, CODES[adapter], M, K, r,
        in_scale, *dropping(drop), e, scale, ACTIVATIONS.index(phi), t, CODES[t_dtype or adapter],
        v, sms, order,
    )  # fmt: skip

    def formula(wide):
        down = A.to(wide) if in_scale is None else (A * in_scale.to(adapter)).to(wide)
        return (x.to(wide) * kept) @ down.T / after

    def after_t(t):
        v = activate(t, phi) if e is None else activate(t, phi) * e.to(t.dtype)
        return v * scale

    exact, eager = formula(torch.float64), formula(adapter)
    if t is not None:
        assert_as_good_as(t, eager.to(t.dtype), exact, "t")
    if v is not None:
        assert_as_good_as(v, after_t(eager), after_t(exact), "v")
    return t, v


def column_walk(
    library, dtype, shape, R, L, *, extra=0, drop=False, other=False, sums=False,
    scaled=(), sms=1, order=1,
):  # fmt: skip
    """R or L 0: no u or no c.  scaled: of "big" and "other"."""
    base, adapter = DTYPES[dtype]
    M, N = shape
    big = strided(M, N, extra, dtype=base, seed=1)
    right = tensor(N, R, dtype=adapter, seed=2) if R else None
    left = tensor(M, L, dtype=adapter, seed=3) if L else None
    beside = tensor(M, N, dtype=base, seed=4) if other else None
    scale = tensor(N, dtype=torch.float32, seed=5) if scaled else None
    kept = mask(M, N) if drop else torch.ones(M, N, dtype=torch.bool)
    u = torch.empty(M, R) if R else None
    c = torch.empty(L, N) if L else None
    s, p = torch.empty(N) if sums else None, torch.empty(N) if other else None
    scaled_big = torch.empty(M, N, dtype=base) if "big" in scaled else None
    scaled_other = torch.empty(M, N, dtype=base) if "other" in scaled else None
    call(
        library, "run_column_walk", big, CODES[base], big.stride(0), M, N, right, R, left, L,
        CODES[adapter], *dropping(drop), beside, scale, u, c, s, p, scaled_big, scaled_other,
        sms, order,
    )  # fmt: skip

    def formulas(wide):
        B = big.to(wide)
        yield None if right is None else B @ right.to(wide)
        yield None if left is None else left.to(wide).T @ (B * kept)
        yield B.sum(0)
        yield None if beside is None else (B * beside.to(wide)).sum(0)
        yield None if scale is None else (B * scale.to(wide)).to(wide)
        yield None if scale is None or beside is None else beside.to(wide) * scale.to(wide)

    found = u, c, s, p, scaled_big, scaled_other
    names = "u", "c", "s", "p", "scaled_big", "scaled_other"
    rows = zip(names, found, formulas(torch.float32), formulas(torch.float64), strict=True)
    for name, actual, eager, exact in rows:
        if actual is not None:
            assert_as_good_as(actual, eager.to(actual.dtype), exact, name)
    return found
