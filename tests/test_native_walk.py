"""The host kernels that walk a large matrix, at every instruction set that this machine has.

down_projection, column_walk and up_expansion against float64, and their contract: any sizes, any
addresses, nothing read past an end, the same bits from any number of threads.
"""

import itertools

import pytest
import torch

from decomp_kernels import native_library
from decomp_kernels.reference.decomposed_linear import activate
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as

if why := native_library.why_not_loaded():
    pytest.skip(why, allow_module_level=True)

OPS = native_library.ops()
F32, B16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (B16, B16), (B16, F32), (F32, B16)]  # of the large and of the small operands
RANKS = [1, 3, 16, 17, 64, 100]
ACTIVATIONS = ["identity", "relu", "silu", "gelu", "tanh"]
# Rows and columns around the sizes of panels (32 or 64 x 128) and of units of work (512 x 256, 64
# rows, 256 x 512).
SHAPES = [(1, 1), (2, 31), (7, 33), (33, 128), (67, 131), (1030, 40), (5, 1037)]

dtypes = pytest.mark.parametrize(
    ("wide", "small"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def threads_and_numbers():
    torch.manual_seed(0)
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def of(dtype, *shape):
    """Random numbers at an address that is a multiple of no vector, NaN before and after them."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 70,), float("nan"), dtype=dtype)
    memory[3 : 3 + size] = torch.randn(size)
    return memory[3 : 3 + size].view(shape)


def masked(x, seed, p):
    return x if p == 0.0 else x * keep_mask(seed, tuple(x.shape), p)


def check(actual, eager, exact, name):
    """Results are float32 sums: no bf16 rounding but that of what is stored in bf16."""
    assert actual.is_contiguous()
    assert_as_good_as(actual, eager.to(actual.dtype), exact, name)


@dtypes
def test_down_projection(level, wide, small):
    options = itertools.cycle(itertools.product(ACTIVATIONS, [True, False], [1.0, 0.7], [0.0, 0.3]))
    for (M, K), r in itertools.product(SHAPES, RANKS):
        phi, has_core, scale, p = next(options)
        x, down, seed = of(wide, M, K), of(small, r, K).mul_(K**-0.5), torch.tensor(-M * r)
        core = of(torch.float32, r) if has_core else None
        t, v = OPS.down_projection(x, down, core, seed, scale, p, phi)
        name = f"{M} x {K}, r={r}, {phi}, core={has_core}, scale={scale}, p={p}"

        def branch(dtype):
            t = masked(x.to(dtype), seed, p) @ down.to(dtype).T / kept_fraction(p)  # noqa: B023
            v = activate(t, phi) * scale  # noqa: B023
            return t, v if core is None else v * core.to(dtype)  # noqa: B023

        exact, eager = branch(torch.float64), branch(F32)
        assert t.dtype == v.dtype == small
        check(t, eager[0], exact[0], f"t {name}")
        if core is None and scale == 1.0 and phi == "identity":
            assert v.shape == (0,)
        else:
            check(v, eager[1], exact[1], f"v {name}")


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_column_walk(level, wide, small, p):
    by_rank = itertools.cycle([False, True])
    for (M, N), r in itertools.product(SHAPES, RANKS):
        big, other, scale = of(wide, M, N), of(wide, M, N), of(F32, N)
        right, left, seed = of(small, N, r), of(small, M, r), torch.tensor(N - 9)
        rows_first = next(by_rank)
        actual = OPS.column_walk(big, right, left, other, scale, seed, p, True, rows_first)

        def results(dtype):
            a = big.to(dtype)  # noqa: B023
            c = masked(a, seed, p).T @ left.to(dtype)  # noqa: B023
            return (
                a @ right.to(dtype),  # noqa: B023
                c.T if rows_first else c,  # noqa: B023
                (a * other.to(dtype)).sum(0),  # noqa: B023
                a.sum(0),
                a * scale.to(dtype),  # noqa: B023
            )

        exact, eager = results(torch.float64), results(F32)
        assert [t.dtype for t in actual] == [F32, F32, F32, F32, wide]
        for name, *three in zip(("u", "c", "p", "s", "scaled"), actual, eager, exact, strict=True):
            check(*three, f"{name} {M} x {N}, r={r}")


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_up_expansion(level, wide, small, p):
    options = itertools.cycle(itertools.product([None, F32, B16], [True, False]))
    for (M, N), r in itertools.product(SHAPES, RANKS):
        bias_dtype, has_addend = next(options)
        v, b, seed = of(small, M, r), of(small, r, N), torch.tensor(M + 2**62)
        bias = None if bias_dtype is None else of(bias_dtype, N)
        addend = of(wide, M, N) if has_addend else None
        actual = OPS.up_expansion(v, b, bias, addend, seed, p, wide)

        def result(dtype):
            out = masked(v.to(dtype) @ b.to(dtype), seed, p)  # noqa: B023
            out = out if bias is None else out + bias.to(dtype)  # noqa: B023
            return out if addend is None else out + addend.to(dtype)  # noqa: B023

        assert actual.dtype == wide
        check(actual, result(F32), result(torch.float64), f"{M} x {N}, r={r}")


def test_each_result_stands_alone(level):
    """What else is asked for changes no bit, and what is not asked for is empty."""
    M, N, r = 300, 523, 17
    for wide, small in DTYPES:
        big, other, scale = of(wide, M, N), of(wide, M, N), of(F32, N)
        right, left, seed = of(small, N, r), of(small, M, r), torch.tensor(3)
        for p in (0.0, 0.5):
            whole = OPS.column_walk(big, right, left, other, scale, seed, p, True, False)
            for asked in itertools.product([True, False], repeat=5):
                some = [x if a else None for x, a in zip((right, left, other, scale), asked)]
                part = OPS.column_walk(big, *some, seed, p, asked[4], False)
                order = asked[0], asked[1], asked[2], asked[4], asked[3]
                for one, reference, there in zip(part, whole, order, strict=True):
                    assert torch.equal(one, reference) if there else one.shape == (0,)


def test_rank_first_is_the_transpose(level):
    big, left = of(B16, 70, 200), of(F32, 70, 20)
    c = OPS.column_walk(big, None, left, None, None, None, 0.0, False, False)[1]
    by_rank = OPS.column_walk(big, None, left, None, None, None, 0.0, False, True)[1]
    assert c.shape == (200, 20) and torch.equal(c.T, by_rank)


@dtypes
def test_threads_change_no_bit(level, wide, small):
    M, N, r, p, seed = 700, 1100, 19, 0.2, torch.tensor(11)
    big, other, scale = of(wide, M, N), of(wide, M, N), of(F32, N)
    right, left, down = of(small, N, r), of(small, M, r), of(small, r, N)

    def all_of_them():
        return (
            *OPS.down_projection(big, down, None, seed, 0.5, p, "silu"),
            *OPS.column_walk(big, right, left, other, scale, seed, p, True, True),
            OPS.up_expansion(left, down, scale, other, seed, p, wide),
        )

    torch.set_num_threads(1)
    first = all_of_them()
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, first, all_of_them()))


@pytest.mark.parametrize(("M", "N", "r"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_nothing_to_do(level, M, N, r):
    seed = torch.tensor(1)
    x, right, left = torch.ones(M, N), torch.ones(N, r), torch.ones(M, r)
    walk = OPS.column_walk(x, right, left, x, torch.ones(N), seed, 0.5, True, False)
    for one, shape in zip(walk, [(M, r), (N, r), (N,), (N,), (M, N)], strict=True):
        assert one.shape == shape
    assert not any(one.any() for one in walk[:2])
    if M == 0:
        assert not any(one.any() for one in walk)
    t, v = OPS.down_projection(x, right.T.contiguous(), None, seed, 2.0, 0.5, "relu")
    assert t.shape == v.shape == (M, r) and not t.any() and not v.any()
    out = OPS.up_expansion(left, right.T.contiguous(), torch.ones(N), x, seed, 0.5, F32)
    assert torch.equal(out, torch.full((M, N), 2.0))


def test_all_but_nothing_is_dropped(level):
    x, eye, seed = torch.ones(64, 129), torch.eye(129), torch.tensor(5)
    for p in (0.0, 1e-6, 0.999, 65535 / 65536):
        t, _ = OPS.down_projection(x, eye, None, seed, 1.0, p, "identity")
        kept = keep_mask(seed, (64, 129), p)
        assert torch.equal(t != 0, kept)
        assert torch.equal(
            OPS.up_expansion(x, eye.new_ones(129, 129), None, None, seed, p, F32) != 0, kept
        )
        without = OPS.down_projection(x, eye, None, None, 1.0, p, "identity")[0]
        assert torch.equal(without, x)  # no seed: no mask


def test_what_is_not_a_number_stays_so(level):
    nan, inf = float("nan"), float("inf")
    big = torch.tensor([[nan, inf, -inf, 1.0, -0.0]]).repeat(9, 7)
    for dtype in (F32, B16):
        x = big.to(dtype)
        scaled = OPS.column_walk(x, None, None, None, torch.ones(35), None, 0.0, False, False)[4]
        torch.testing.assert_close(scaled, x, rtol=0, atol=0, equal_nan=True)
        addend = OPS.up_expansion(x[:, :1] * 0 + 0.0, x[:1] * 0, None, x, None, 0.0, dtype)
        assert addend.isnan().all()  # NaN * 0 is a term of every sum


def test_rounding_is_to_nearest_even(level):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.3e38] * 5)
    out = OPS.up_expansion(torch.zeros(2, 1), torch.zeros(1, 25), ties, None, None, 0.0, B16)
    assert torch.equal(out, ties.to(B16).expand(2, 25))


def test_schema():
    x, small = torch.randn(5, 6), torch.randn(3, 6)
    v, seed = torch.randn(5, 3), torch.tensor(1)
    only = {"test_utils": ("test_schema",)}
    arguments = (x, small, None, seed, 2.0, 0.5, "tanh")
    torch.library.opcheck(OPS.down_projection.default, arguments, **only)
    arguments = (x, small.T.contiguous(), v, x, x[0], seed, 0.5, True, True)
    torch.library.opcheck(OPS.column_walk.default, arguments, **only)
    arguments = (v, small, x[0], x, seed, 0.5, F32)
    torch.library.opcheck(OPS.up_expansion.default, arguments, **only)


X, DOWN, UP, V = torch.ones(5, 6), torch.ones(3, 6), torch.ones(6, 3), torch.ones(5, 3)
SEED, TALL = torch.tensor(1), torch.ones(6, 5)
PROJECT, WALK, EXPAND = "down_projection", "column_walk", "up_expansion"
WRONG = [
    (PROJECT, (X, DOWN[:, :5], None, None, 1.0, 0.0, "relu"), r"down must have shape \(any, 6\)"),
    (PROJECT, (X[0], DOWN, None, None, 1.0, 0.0, "relu"), r"x must have shape \(any, any\)"),
    (PROJECT, (TALL.T, DOWN, None, None, 1.0, 0.0, "relu"), "x must be contiguous"),
    (PROJECT, (X.half(), DOWN, None, None, 1.0, 0.0, "relu"), "x must be float32 or bfloat16"),
    (PROJECT, (X, DOWN.double(), None, None, 1.0, 0.0, "relu"), "down must be float32"),
    (PROJECT, (X, DOWN, V[0].bfloat16(), None, 1.0, 0.0, "relu"), "core must be Float"),
    (PROJECT, (X, DOWN, X[0], None, 1.0, 0.0, "relu"), r"core must have shape \(3\)"),
    (PROJECT, (X, DOWN, None, None, 1.0, 0.0, "step"), "activation must be .* got step"),
    (PROJECT, (X, DOWN, None, SEED.int(), 1.0, 0.5, "relu"), "seed must be Long"),
    (PROJECT, (X, DOWN, None, X, 1.0, 0.5, "relu"), "seed must hold one element"),
    (PROJECT, (X, DOWN, None, SEED, 1.0, 1.0, "relu"), r"dropout must be in \[0, 1\)"),
    (PROJECT, (X, DOWN, None, SEED, 1.0, 1 - 1e-9, "relu"), "dropout must keep something"),
    (PROJECT, (X, DOWN, None, SEED, 1.0, float("nan"), "relu"), r"dropout must be in"),
    (WALK, (X, DOWN, None, None, None, None, 0.0, False), r"right must have shape \(6, any\)"),
    (WALK, (X, None, UP, None, None, None, 0.0, False), r"left must have shape \(5, any\)"),
    (WALK, (X, UP, V[:, :2], None, None, None, 0.0, False), r"left must have shape \(5, 3\)"),
    (WALK, (X, UP, V.bfloat16(), None, None, None, 0.0, False), "left must be Float"),
    (WALK, (X, None, None, TALL, None, None, 0.0, False), r"other must have shape \(5, 6\)"),
    (WALK, (X, None, None, X.bfloat16(), None, None, 0.0, False), "other must be Float"),
    (WALK, (X, None, None, None, X[0].bfloat16(), None, 0.0, False), "scale must be Float"),
    (WALK, (X, None, None, None, V[0], None, 0.0, False), r"scale must have shape \(6\)"),
    (WALK, (X.double(), None, None, None, None, None, 0.0, True), "big must be float32"),
    (EXPAND, (V, UP, None, None, None, 0.0, F32), r"small must have shape \(3, any\)"),
    (EXPAND, (V, DOWN.bfloat16(), None, None, None, 0.0, F32), "small must be Float"),
    (EXPAND, (V, DOWN, V[0], None, None, 0.0, F32), r"bias must have shape \(6\)"),
    (EXPAND, (V, DOWN, X[0].double(), None, None, 0.0, F32), "bias must be float32"),
    (EXPAND, (V, DOWN, None, X, None, 0.0, B16), "addend must be BFloat16"),
    (EXPAND, (V, DOWN, None, TALL, None, 0.0, F32), r"addend must have shape \(5, 6\)"),
    (EXPAND, (V, DOWN, None, None, None, 0.0, torch.float16), "dtype must be float32 or"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG)
def test_says_what_is_wrong(name, arguments, message):
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(OPS, name)(*arguments)
