"""Host kernels on weights, at every level of this machine: norms, merged weights, Gram matrices.

Against the definitions in float64.  What plain PyTorch is allowed is what it loses in float32 on
the same operands: products of bf16 are exact and sums are float32.
"""

import itertools
import subprocess
import sys

import pytest
import torch

from decomp_kernels import native_library
from decomp_kernels.kernels.aten import gram as aten_gram
from decomp_kernels.kernels.native import gram, merged_weight, row_norm
from decomp_kernels.reference import decomposed_linear as merged_reference
from decomp_kernels.reference import gram as gram_reference
from decomp_kernels.reference import row_norm as reference
from decomp_kernels.testing import assert_as_good_as, relative_error

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp32-bf16": (torch.float32, torch.bfloat16),
}
RANKS = (1, 3, 16, 17, 64, 100)
# Several parts of d_down, several blocks a part, blocks of the fewest rows, tails of every tile.
SHAPES = [(0, 5), (1, 7), (5, 0), (1, 1), (37, 53), (24, 32), (601, 40), (300, 600), (13, 5600)]

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def random(*shape, dtype=torch.float32, seed=0):
    """Contiguous, and not where vectors would like it to be."""
    gen = torch.Generator().manual_seed(seed)
    flat = torch.randn(torch.Size(shape).numel() + 1, generator=gen).to(dtype)
    return flat[1:].view(shape)


def make(shape, r, dtype):
    base, adapter = DTYPES[dtype]
    N, K = shape
    return (
        random(N, K, dtype=base, seed=1),
        random(r, K, dtype=adapter, seed=2),
        random(N, r, dtype=adapter, seed=3),
    )


def in_dtype(dtype, *tensors):
    return [tensor.to(dtype) for tensor in tensors]


# Row norms


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_norms_match_the_definition(shape, dtype, level):
    for r in RANKS:
        operands = make(shape, r, dtype)
        weight_sq = row_norm.squared_rows(operands[0])
        norm = row_norm.forward(operands[0], weight_sq, *operands[1:], 0.7)
        exact, eager = (
            reference.forward(*in_dtype(wide, *operands), 0.7)
            for wide in (torch.float64, torch.float32)
        )
        assert norm.dtype == torch.float32
        assert_as_good_as(norm, eager, exact, f"norm, r = {r}")
        squares = operands[0].double().square().sum(1)
        assert_as_good_as(weight_sq, operands[0].float().square().sum(1), squares, "squared_rows")


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_norm_gradients_match_the_definition(shape, dtype, level):
    for r in RANKS:
        operands = make(shape, r, dtype)
        norm = random(shape[0], seed=4).abs() + 0.5  # any: the formula takes what it is given
        d_norm = random(shape[0], seed=5)
        ours = row_norm.backward(d_norm, norm, *operands, 0.7)
        exact, eager = (
            reference.backward(*in_dtype(wide, d_norm, norm, *operands), 0.7)
            for wide in (torch.float64, torch.float32)
        )
        for name, *values in zip(("d_down", "d_up"), ours, eager, exact, strict=True):
            assert values[0].dtype == torch.float32
            assert_as_good_as(*values, f"{name}, r = {r}")


@dtypes
def test_row_norms_keep_float32_precision(dtype, level):
    operands = make((70, 300), 16, dtype)
    norm = row_norm.forward(operands[0], row_norm.squared_rows(operands[0]), *operands[1:], 0.7)
    exact = reference.forward(*in_dtype(torch.float64, *operands), 0.7)
    assert relative_error(norm, exact) < 2e-7
    d_norm = random(70, seed=5)
    ours = row_norm.backward(d_norm, norm, *operands, 0.7)
    exact = reference.backward(*in_dtype(torch.float64, d_norm, norm, *operands), 0.7)
    for actual, true in zip(ours, exact, strict=True):
        assert relative_error(actual, true) < 1e-6


def test_without_an_update_the_norm_is_exactly_the_weights(level):
    for dtype in DTYPES:
        weight, down, up = make((50, 37), 5, dtype)
        squares = row_norm.squared_rows(weight)
        root = squares.double().sqrt().float()  # torch's float32 sqrt is off by a bit now and then
        start = row_norm.forward(weight, squares, down, torch.zeros_like(up), 0.7)
        assert torch.equal(start, root)
        no_rank = row_norm.forward(weight, squares, down[:0], up[:, :0].contiguous(), 0.7)
        assert torch.equal(no_rank, root)


def test_where_the_update_cancels_the_weight_the_norm_is_zero_and_not_nan(level):
    up, down = random(60, 3), random(3, 8, seed=1)
    weight = -(up @ down)
    norm = row_norm.forward(weight, row_norm.squared_rows(weight), down, up, 1.0)
    assert torch.isfinite(norm).all() and (norm >= 0).all() and norm.max() < 2e-2


def test_a_nan_stays_in_its_row(level):
    for dtype in DTYPES:
        weight, down, up = make((50, 37), 5, dtype)
        weight[7, 36] = float("nan")
        norm = row_norm.forward(weight, row_norm.squared_rows(weight), down, up, 0.7)
        assert norm.isnan().nonzero().tolist() == [[7]]


@dtypes
def test_row_norms_do_not_depend_on_the_number_of_threads(dtype, level, threads):
    operands = make((900, 500), 17, dtype)
    d_norm, norm = random(900, seed=4), random(900, seed=5).abs() + 1
    results = []
    for count in threads:
        torch.set_num_threads(count)
        squares = row_norm.squared_rows(operands[0])
        results.append(
            (
                squares,
                row_norm.forward(operands[0], squares, *operands[1:], 0.7),
                *row_norm.backward(d_norm, norm, *operands, 0.7),
            )
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_wrong_row_norm_calls_say_what_is_wrong(level):
    ops = native_library.ops()
    weight, down, up = make((6, 8), 3, "fp32")
    squares = torch.ones(6)
    good = {"weight": weight, "weight_sq": squares, "down": down, "up": up, "scale": 1.0}
    for change, says in (
        ({"weight": weight[0]}, r"weight must have shape \(any, any\), got \(8\)"),
        ({"weight": weight.half()}, "weight must be float32 or bfloat16, got Half"),
        ({"weight": weight.T.contiguous().T}, "weight must be contiguous"),
        ({"down": down[:, :7].contiguous()}, r"down must have shape \(any, 8\), got \(3, 7\)"),
        ({"down": down.double()}, "down must be float32 or bfloat16, got Double"),
        ({"down": down.bfloat16()}, "up must be BFloat16, got Float"),
        ({"up": up[:, :2].contiguous()}, r"up must have shape \(6, 3\), got \(6, 2\)"),
        ({"up": up[:5]}, r"up must have shape \(6, 3\), got \(5, 3\)"),
        ({"weight_sq": squares[:5]}, r"weight_sq must have shape \(6\), got \(5\)"),
        ({"weight_sq": squares.double()}, "weight_sq must be Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=f"row_norm_fwd: {says}"):
            ops.row_norm_fwd(**{**good, **change})
    good = {"d_norm": squares, "norm": squares, **good}
    del good["weight_sq"]
    for change, says in (
        ({"d_norm": squares[:5]}, r"d_norm must have shape \(6\), got \(5\)"),
        ({"norm": squares.bfloat16()}, "norm must be Float, got BFloat16"),
        ({"norm": torch.ones(12)[::2]}, "norm must be contiguous"),
        ({"up": up.T}, r"up must have shape \(6, 3\), got \(3, 6\)"),
    ):
        with pytest.raises(RuntimeError, match=f"row_norm_bwd: {says}"):
            ops.row_norm_bwd(**{**good, **change})
    with pytest.raises(RuntimeError, match="squared_rows: weight must be float32 or bfloat16"):
        ops.squared_rows(weight.double())
    with pytest.raises(RuntimeError, match="squared_rows: weight must have shape"):
        ops.squared_rows(weight[0])


# Merged weights


def merge_terms(shape, r, dtype, has):
    weight, down, up = make(shape, r, dtype)
    small = DTYPES[dtype][1]
    N, K = shape
    return (
        weight,
        down if "low_rank" in has else None,
        up if "low_rank" in has else None,
        random(r, dtype=small, seed=6) if "core" in has else None,
        random(K, dtype=small, seed=7) if "in_scale" in has else None,
        random(N, dtype=small, seed=8) if "out_scale" in has else None,
        -1.3,
    )


def check_merge(terms, name):
    exact, eager = (
        merged_reference.merged_weight(
            *(t.to(wide) if isinstance(t, torch.Tensor) else t for t in terms)
        )
        for wide in (torch.float64, torch.float32)
    )
    ours = merged_weight.merged_weight(*terms)
    assert ours.dtype == terms[0].dtype and ours.shape == terms[0].shape
    assert_as_good_as(ours, eager.to(ours.dtype), exact, name)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merged_weights_match_the_definition(shape, dtype, level):
    for r in RANKS:
        check_merge(merge_terms(shape, r, dtype, {"low_rank"}), f"r = {r}")


@dtypes
def test_every_choice_of_merged_terms(dtype, level):
    terms = ("low_rank", "core", "in_scale", "out_scale")
    for count in range(5):
        for has in itertools.combinations(terms, count):
            if "core" not in has or "low_rank" in has:
                check_merge(merge_terms((21, 37), 5, dtype, has), str(has))


@dtypes
def test_a_weight_without_change_stays_itself(dtype, level):
    weight = make((9, 37), 1, dtype)[0]
    weight[3, 5] = -0.0
    same = merged_weight.merged_weight(weight, None, None, None, None, None, 1.0)
    assert torch.equal(same, weight) and same[3, 5].signbit()
    assert same.data_ptr() != weight.data_ptr()


def test_merged_weights_do_not_depend_on_the_number_of_threads(level, threads):
    for dtype in DTYPES:
        has = {"low_rank", "core", "in_scale", "out_scale"}
        terms, results = merge_terms((401, 700), 17, dtype, has), []
        for count in threads:
            torch.set_num_threads(count)
            results.append(merged_weight.merged_weight(*terms))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_wrong_merges_say_what_is_wrong(level):
    call = native_library.ops().merged_weight
    weight, down, up, core, in_scale, out_scale, _ = merge_terms(
        (6, 8), 3, "fp32", {"low_rank", "core", "in_scale", "out_scale"}
    )
    good = {
        "weight": weight, "down": down, "up": up, "core": core, "in_scale": in_scale,
        "out_scale": out_scale, "scale": 1.0,
    }  # fmt: skip
    for change, says in (
        ({"weight": weight.double()}, "weight must be float32 or bfloat16, got Double"),
        ({"down": None}, "down and up come together"),
        ({"down": None, "up": None}, "core scales the low-rank branch"),
        ({"down": down[:, 1:].contiguous()}, r"down must have shape \(any, 8\)"),
        ({"down": down.T.contiguous().T}, "down must be contiguous"),
        ({"up": up.bfloat16()}, "up must be Float, got BFloat16"),
        ({"up": up[1:]}, r"up must have shape \(6, 3\)"),
        ({"core": core[1:]}, r"core must have shape \(3\)"),
        ({"core": core.bfloat16()}, "core must be Float, got BFloat16"),
        ({"in_scale": in_scale[1:]}, r"in_scale must have shape \(8\)"),
        ({"in_scale": in_scale.double()}, "in_scale must be Float"),
        ({"out_scale": out_scale[1:]}, r"out_scale must have shape \(6\)"),
        ({"out_scale": out_scale.double()}, "out_scale must be Float"),
    ):
        with pytest.raises(RuntimeError, match=f"merged_weight: {says}"):
            call(**{**good, **change})


# Gram matrices


def factors(dtype, r=17):
    """Groups of several, of one and of empty matrices; ranks above and below the other size."""
    downs = [random(r, 53, dtype=dtype, seed=i) for i in range(3)]
    downs += [random(2 * r, 9, dtype=dtype, seed=4), random(r, 53, dtype=dtype, seed=5)]
    ups = [random(70, r, dtype=dtype, seed=i + 10) for i in range(3)]
    ups += [random(200, r + 3, dtype=dtype, seed=14), random(0, 2, dtype=dtype)]
    return downs, ups


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "norm"])
@pytest.mark.parametrize("kind", gram_reference.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gram_penalties_match_the_definition(dtype, kind, squared, level):
    for r in RANKS:
        downs, ups = factors(dtype, r)
        lists = [in_dtype(wide, *some) for wide in (torch.float64, dtype) for some in (downs, ups)]
        loss, residuals = gram.forward(downs, ups, kind, squared, 0.3)
        exact, true = gram_reference.forward(*lists[:2], kind, squared, 0.3)
        eager, plain = aten_gram.forward(*lists[2:], kind, squared, 0.3)
        assert_as_good_as(loss, eager, exact, f"loss, r = {r}")
        for values in zip(residuals, plain, true, strict=True):
            assert_as_good_as(*values, f"residual, r = {r}")
        d_loss = torch.tensor(-1.7)
        ours = gram.backward(d_loss, downs, ups, residuals, squared, 0.3)
        exact = gram_reference.backward(d_loss.double(), *lists[:2], true, squared, 0.3)
        eager = aten_gram.backward(d_loss, downs, ups, plain, squared, 0.3)
        for values in zip(ours, eager, exact, strict=True):
            assert values[0].dtype == dtype
            assert_as_good_as(*values, f"gradient, r = {r}")


def test_an_orthonormal_factor_has_no_penalty_and_no_slope(level):
    eye = torch.eye(5, 9)
    loss, residuals = gram.forward([eye], [eye.T], "o", False, 1.0)
    assert loss == 0
    for grad in gram.backward(torch.tensor(1.0), [eye], [eye.T], residuals, False, 1.0):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_gram_penalties_do_not_depend_on_the_number_of_threads(level, threads):
    for dtype in (torch.float32, torch.bfloat16):
        downs = [random(33, 400, dtype=dtype, seed=i) for i in range(7)]
        ups = [random(400, 33, dtype=dtype, seed=i) for i in range(7)]
        results = []
        for count in threads:
            torch.set_num_threads(count)
            loss, E = gram.forward(downs, ups, "o", True, 1.0)
            results.append((loss, *E, *gram.backward(loss, downs, ups, E, True, 1.0)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_wrong_gram_calls_say_what_is_wrong(level):
    ops = native_library.ops()
    A = random(3, 8)
    E, factor = torch.zeros(2, 3, 3), torch.ones(2)
    for matrices, says in (
        ([A, A[:, 1:].contiguous()], r"matrices\[1\] must have shape \(3, 8\), got \(3, 7\)"),
        ([A, A.bfloat16()], r"matrices\[1\] must be Float, got BFloat16"),
        ([A, A.T.contiguous().T], r"matrices\[1\] must be contiguous"),
        ([A.double()], r"matrices\[0\] must be float32 or bfloat16"),
        ([A[0]], r"matrices\[0\] must have shape \(any, any\)"),
    ):
        with pytest.raises(RuntimeError, match=f"gram_fwd: {says}"):
            ops.gram_fwd(matrices, True, True)
        with pytest.raises(RuntimeError, match=f"gram_bwd: {says}"):
            ops.gram_bwd(matrices, E, factor, True)
    with pytest.raises(RuntimeError, match="gram_bwd: matrices must not be empty"):
        ops.gram_bwd([], E, factor, True)
    for E_, factor_, of_rows, says in (
        (E[:1], factor, True, r"residual must have shape \(2, 3, 3\), got \(1, 3, 3\)"),
        (E, factor, False, r"residual must have shape \(2, 8, 8\)"),
        (E.double(), factor, True, "residual must be Float"),
        (E, factor[:1], True, r"factor must have shape \(2\)"),
        (E, factor.double(), True, "factor must be Float"),
    ):
        with pytest.raises(RuntimeError, match=f"gram_bwd: {says}"):
            ops.gram_bwd([A, A], E_, factor_, of_rows)


# All of them


def test_schemas(level):
    ops = native_library.ops()
    for dtype in DTYPES:
        weight, down, up, *rest = merge_terms(
            (6, 20), 3, dtype, {"low_rank", "core", "in_scale", "out_scale"}
        )
        scales = [t.float() if isinstance(t, torch.Tensor) else t for t in rest]
        n = torch.ones(6)
        E, factor = torch.zeros(2, 3, 3), torch.ones(2)
        for op, arguments in (
            (ops.squared_rows, (weight,)),
            (ops.row_norm_fwd, (weight, n, down, up, 1.0)),
            (ops.row_norm_bwd, (n, n, weight, down, up, 1.0)),
            (ops.merged_weight, (weight, down, up, *scales)),
            (ops.gram_fwd, ([up, up], False, True)),
            (ops.gram_bwd, ([up, up], E, factor, False)),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema",))


AT_THE_EDGE = """
import ctypes, mmap, sys
import torch
from decomp_kernels import native_library
from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels.native import (
    block_rotate, dequantize, gram, merged_weight, row_norm
)

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def at_the_edge(tensor):
    # The same values, right before a page that nobody may touch.
    size = tensor.numel() * tensor.element_size()
    pages = size // PAGE + 1
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    closed = libc.mprotect(ctypes.c_void_p(first + pages * PAGE), PAGE, 0)
    assert closed == 0
    start = pages * PAGE - size
    edge = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    edge.copy_(tensor.flatten())
    return edge.view(tensor.shape)

native_library.ops().set_cpu_level(sys.argv[1])
for base, small in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                    (torch.bfloat16, torch.float32)):
    for N, K, r in ((7, 19, 3), (25, 65, 17), (270, 47, 9)):
        W, A, B = (at_the_edge(torch.randn(shape).to(dtype))
                   for shape, dtype in (((N, K), base), ((r, K), small), ((N, r), small)))
        n, core, k = (at_the_edge(torch.rand(size) + 1) for size in (N, r, K))
        row_norm.forward(W, row_norm.squared_rows(W), A, B, 0.5)
        row_norm.backward(n, n, W, A, B, 0.5)
        merged_weight.merged_weight(W, A, B, core, k, n, 0.5)
        loss, E = gram.forward([A], [B], "o", True, 1.0)
        gram.backward(loss, [A], [B], [at_the_edge(e) for e in E], True, 1.0)
        codes = at_the_edge(torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8))
        absmax = at_the_edge(torch.rand(-(-N * K // 64)))
        int8 = at_the_edge(torch.randint(-128, 128, (N, K), dtype=torch.int8))
        for dtype in (torch.float32, torch.bfloat16):
            dequantize.forward(codes, absmax, "nf4", N, K, dtype)
            dequantize.forward(int8, n, "int8", N, K, dtype)
    for M, q, b in ((7, 4, 3), (33, 3, 17), (40, 1, 130)):
        x, gx = (at_the_edge(torch.randn(M, q * b).to(base)) for _ in range(2))
        m = BlockRotate(at_the_edge(torch.randn(1, q, b, b)))
        block_rotate.forward(m, x)
        block_rotate.backward(m, gx, x)
        rows, cols = (at_the_edge(torch.randint(size, (9,))) for size in (M, M))
        native_library.ops().sampled_products(x, gx, rows, cols)
        values = at_the_edge(torch.randn(9).to(base))
        native_library.ops().scattered_sum(x, rows, rows % x.shape[1], values)
print("nothing touched")
"""


def test_nothing_past_the_end_is_touched(level):
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_EDGE, level],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "nothing touched" in done.stdout, done.stderr[-2000:]
