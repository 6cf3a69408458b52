"""What each device pass must compute, against float64; raises AssertionError where it does not.

The tests and the planted bugs of passes_mutants.py run the same checks on libraries that
``library`` builds: the kernels' own source, run on the host by cuda_on_host.h.
"""

import torch
from emulator import call

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.reference import decomposed_linear
from decomp_kernels.reference import row_norm as reference_norm
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
    """[M, K] whose rows begin K + extra elements apart, NaN between them."""
    whole = tensor(M, K + extra, dtype=dtype, seed=seed)
    whole[:, K:] = torch.nan
    return whole[:, :K]


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
    scaled=(), in_place=False, sms=1, order=1,
):  # fmt: skip
    """R or L 0: no u or no c.  scaled: of "big" and "other", the latter in its own place."""
    base, adapter = DTYPES[dtype]
    M, N = shape
    big = strided(M, N, extra, dtype=base, seed=1)
    right = tensor(N, R, dtype=adapter, seed=2) if R else None
    left = tensor(M, L, dtype=adapter, seed=3) if L else None
    beside = tensor(M, N, dtype=base, seed=4) if other else None
    given = None if beside is None else beside.clone()
    scale = tensor(N, dtype=torch.float32, seed=5) if scaled else None
    kept = mask(M, N) if drop else torch.ones(M, N, dtype=torch.bool)
    u = torch.empty(M, R) if R else None
    c = torch.empty(L, N) if L else None
    s, p = torch.empty(N) if sums else None, torch.empty(N) if other else None
    scaled_big = torch.empty(M, N, dtype=base) if "big" in scaled else None
    scaled_other = torch.empty(M, N, dtype=base) if "other" in scaled else None
    call(
        library, "run_column_walk", big, CODES[base], big.stride(0), M, N, right, R, left, L,
        CODES[adapter], *dropping(drop), given, int(in_place), scale, u, c, s, p, scaled_big,
        scaled_other, sms, order,
    )  # fmt: skip

    def formulas(wide):
        B = big.to(wide)
        yield None if right is None else B @ right.to(wide)
        yield None if left is None else left.to(wide).T @ (B * kept)
        yield B.sum(0)
        yield None if beside is None else (B * beside.to(wide)).sum(0)
        yield None if scale is None else B * scale.to(wide)
        yield None if scale is None or beside is None else beside.to(wide) * scale.to(wide)

    found = u, c, s, p, scaled_big, given if in_place else scaled_other
    names = "u", "c", "s", "p", "scaled_big", "scaled_other"
    rows = zip(names, found, formulas(torch.float32), formulas(torch.float64), strict=True)
    for name, actual, eager, exact in rows:
        if actual is not None:
            assert_as_good_as(actual, eager.to(actual.dtype), exact, name)
    return found


def up_expansion(
    library, dtype, shape, r, *, is_up=False, drop=False, bias=False, addend=False, in_place=False,
    order=1,
):  # fmt: skip
    base, adapter = DTYPES[dtype]
    M, C = shape
    v, small = tensor(M, r, dtype=adapter, seed=1), tensor(r, C, dtype=adapter, seed=2)
    added = tensor(C, dtype=torch.float32, seed=3) if bias else None
    start = tensor(M, C, dtype=base, seed=4) if addend else None
    given = None if start is None else start.clone()
    out = given if in_place else torch.empty(M, C, dtype=base)
    down, up = (None, small.T.contiguous()) if is_up else (small, None)
    call(
        library, "run_up_expansion", v, CODES[adapter], down, up, M, C, r, *dropping(drop), added,
        given, int(in_place), out, CODES[base], order,
    )  # fmt: skip

    def formula(wide):
        product = v.to(wide) @ small.to(wide)
        product = product * mask(M, C) if drop else product
        product = product if added is None else product + added.to(wide)
        return product if start is None else product + start.to(wide)

    assert_as_good_as(out, formula(base), formula(torch.float64), "out")
    return out


def merged_weight(library, dtype, shape, r, *, core=False, scales=False, transposed=False, order=1):
    """r 0: without up and down."""
    base, adapter = DTYPES[dtype]
    N, K = shape
    W = tensor(K, N, dtype=base, seed=1).T if transposed else tensor(N, K, dtype=base, seed=1)
    B = tensor(N, r, dtype=adapter, seed=2) if r else None
    A = tensor(r, K, dtype=adapter, seed=3) if r else None
    e = tensor(r, dtype=torch.float32, seed=4) if core else None
    s_in = tensor(K, dtype=torch.float32, seed=5) if scales else None
    s_out = tensor(N, dtype=torch.float32, seed=6) if scales else None
    out = torch.empty(N, K, dtype=base)
    call(
        library, "run_merged_weight", W, CODES[base], *W.stride(), B, A, CODES[adapter], N, K, r,
        e, s_in, s_out, 1.5, out, order,
    )  # fmt: skip
    reference = decomposed_linear.merged_weight
    eager = reference(W, A, B, e, s_in, s_out, 1.5)
    wide = [None if t is None else t.double() for t in (W, A, B, e, s_in, s_out)]
    assert_as_good_as(out, eager, reference(*wide, 1.5), "out")
    return out


def nf4(library, dtype, shape, blocksize, order=1):
    N, K = shape
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (-(-N * K // 2) * 2,), generator=gen)
    absmax = torch.rand(-(-N * K // blocksize), generator=gen) + 0.5
    packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)
    out = torch.empty(N, K, dtype=dtype)
    call(library, "run_nf4", packed, absmax, blocksize, N, K, out, CODES[dtype], order)
    values = NF4_LEVELS.float()[codes[: N * K]] * absmax.repeat_interleave(blocksize)[: N * K]
    assert torch.equal(out, values.view(N, K).to(dtype))


def int8(library, dtype, shape, order=1):
    gen = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=gen, dtype=torch.int8)
    absmax = torch.rand(shape[0], generator=gen) + 0.5
    out = torch.empty(shape, dtype=dtype)
    call(library, "run_int8", codes, absmax, *shape, out, CODES[dtype], order)
    assert torch.equal(out, (codes.float() * (absmax / 127.0)[:, None]).to(dtype))


# QLoRA (arXiv 2305.14314), appendix E.
NF4_LEVELS = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], dtype=torch.float64,
)  # fmt: skip


def row_norm(library, dtype, shape, r, *, sms=1, order=1):
    """The squares, the norm and both gradients, as the definition gives them."""
    base, adapter = DTYPES[dtype]
    N, K = shape
    W, A = tensor(N, K, dtype=base, seed=1), tensor(r, K, dtype=adapter, seed=2)
    B, d_norm = tensor(N, r, dtype=adapter, seed=3), tensor(N, dtype=torch.float32, seed=4)
    scale = 0.3
    squares, norm = torch.empty(N), torch.empty(N)
    call(library, "run_squared_rows", W, CODES[base], N, K, squares, order)
    wide = W.double(), A.double(), B.double()
    exact_squares = wide[0].square().sum(1)
    assert_as_good_as(squares, W.float().square().sum(1), exact_squares, "squares")
    arguments = A, B, CODES[adapter], N, K, r
    call(library, "run_row_norm", W, CODES[base], *arguments, squares, scale, norm, sms, order)
    eager = reference_norm.forward(W.float(), A.float(), B.float(), scale)
    exact = reference_norm.forward(*wide, scale)
    assert_as_good_as(norm, eager, exact, "norm")
    d_down, d_up = torch.empty(r, K), torch.empty(N, r)
    call(
        library, "run_row_norm_gradients", d_norm, norm, W, CODES[base], *arguments, scale,
        d_down, d_up, sms, order,
    )  # fmt: skip
    eager = reference_norm.backward(d_norm, norm, W.float(), A.float(), B.float(), scale)
    exact = reference_norm.backward(d_norm.double(), exact, *wide, scale)
    assert_as_good_as(d_down, eager[0], exact[0], "d_down")
    assert_as_good_as(d_up, eager[1], exact[1], "d_up")
    return norm, d_down, d_up
