"""The host kernels of sparse values, at every level of this machine, against float64."""

import pytest
import torch
from test_native_norm import random

import decomp_kernels as dk
from decomp_kernels import native_library
from decomp_kernels.bench.observed import Observed
from decomp_kernels.factors import Scatter
from decomp_kernels.kernels.aten import scatter as aten
from decomp_kernels.kernels.native import scatter
from decomp_kernels.ops import scatter as operator
from decomp_kernels.reference import scatter as reference
from decomp_kernels.testing import assert_as_good_as, relative_error

DTYPES = (torch.float32, torch.bfloat16)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def places(count, N, K):
    gen = torch.Generator().manual_seed(count)
    flat = torch.randperm(N * K, generator=gen)[:count].sort().values
    return flat // K, flat % K


@dtypes
@pytest.mark.parametrize("M", [0, 1, 15, 33, 64, 300, 2048, 5000])
@pytest.mark.parametrize("count", [0, 1, 70])
def test_gradients_match_the_definition(M, count, dtype, level):
    N, K = 40, 90
    weight, g, x = (random(*s, dtype=dtype, seed=i) for i, s in enumerate(((N, K), (M, N), (M, K))))
    m = Scatter(*places(count, N, K), torch.empty(count, dtype=torch.float32))
    exact = reference.contract(
        Scatter(m.rows, m.cols, m.values.double()), weight.double(), g.double(), x.double()
    )
    ours = scatter.contract(m, weight, g, x)
    assert ours.dtype == m.values.dtype
    assert_as_good_as(ours, aten.contract(m, weight, g, x), exact, "values")


@dtypes
@pytest.mark.parametrize("small", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (40, 90), (300, 700)], ids=str)
def test_sums_are_the_definition_s_to_the_bit(shape, small, dtype, level):
    weight = random(*shape, dtype=dtype)
    for count in {0, min(1, weight.numel()), weight.numel() // 3}:
        rows, cols = places(count, *shape)
        order = torch.randperm(count)  # in any order
        m = Scatter(rows[order], cols[order], random(count, dtype=small, seed=2))
        before = weight.clone()
        assert torch.equal(scatter.build(m, weight), reference.build(m, weight))
        assert torch.equal(weight, before)


def test_float16_values_on_a_quantized_weight(level):
    """A weight map may be float16 there, whatever x is; the sums then are float32 all the same."""
    linear = torch.nn.Linear(64, 32, bias=False)
    weight = dk.QuantizedLinear.from_linear(linear, "nf4").quantized_weight()
    m = Scatter(*places(50, 32, 64), random(50, dtype=torch.float16, seed=2).requires_grad_())
    for dtype in DTYPES:
        x = random(5, 64, dtype=dtype)
        ours = dk.decomposed_linear(x, weight, weight_map=m, impl="native:passes")
        exact = dk.decomposed_linear(x, weight, weight_map=m, impl="reference")
        torch.testing.assert_close(ours, exact)
        (d_ours,) = torch.autograd.grad(ours.sum(), m.values)
        (d_exact,) = torch.autograd.grad(exact.sum(), m.values)
        assert d_ours.dtype == torch.float16
        torch.testing.assert_close(d_ours, d_exact)


def test_gradients_do_not_depend_on_the_number_of_threads(level, threads):
    for dtype in DTYPES:
        weight, g, x = (random(*s, dtype=dtype) for s in ((256, 512), (700, 256), (700, 512)))
        m = Scatter(*places(4000, 256, 512), torch.empty(4000))
        results = []
        for count in threads:
            torch.set_num_threads(count)
            results.append(scatter.contract(m, weight, g, x))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_wrong_calls_say_what_is_wrong(level):
    call = native_library.ops().sampled_products
    left, right = random(4, 6), random(5, 6)
    rows, cols = torch.tensor([0, 3]), torch.tensor([4, 0])
    for terms, says in (
        ((left[0], right, rows, cols), r"left must have shape \(any, any\)"),
        ((left, right[:, :5].contiguous(), rows, cols), r"right must have shape \(any, 6\)"),
        ((left, right.bfloat16(), rows, cols), "right must be Float, got BFloat16"),
        ((left.double(), right.double(), rows, cols), "left must be float32 or bfloat16"),
        ((left, right, rows.int(), cols), "rows must be Long, got Int"),
        ((left, right, rows, cols[:1]), r"cols must have shape \(2\), got \(1\)"),
        ((left, right, rows + 1, cols), "rows must be from 0 to 3, got 4"),
        ((left, right, rows, cols - 1), "cols must be from 0 to 4, got -1"),
        ((left[:0], right, rows, cols), "rows must be from 0 to -1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=f"sampled_products: {says}"):
            call(*terms)
    weight, values = random(4, 5), random(2)
    for terms, says in (
        ((weight, rows, cols, values[:1]), r"rows must have shape \(1\), got \(2\)"),
        ((weight, rows + 1, cols, values), "rows must be from 0 to 3, got 4"),
        ((weight, rows, cols + 1, values), "cols must be from 0 to 4, got 5"),
        ((weight, rows, cols, values.double()), "values must be float32 or bfloat16"),
        ((weight.T, rows, cols, values), "weight must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"scattered_sum: {says}"):
            native_library.ops().scattered_sum(*terms)


def test_schemas(level):
    places = torch.tensor([0, 3]), torch.tensor([4, 0])
    ops = native_library.ops()
    for op, terms in (
        (ops.sampled_products, (random(4, 6), random(5, 6), *places)),
        (ops.scattered_sum, (random(4, 5), *places, random(2))),
    ):
        torch.library.opcheck(op.default, terms, test_utils=("test_schema",))


@pytest.mark.parametrize(
    ("density", "impl", "who"),
    [(0.01, "auto", "native"), (0.5, "auto", "aten"), (0.5, "native:passes", "native")],
)
def test_auto_takes_it_where_a_dense_product_is_slower(density, impl, who, measured_level):
    weight, g, x = random(48, 64), random(5, 48), random(5, 64)
    count = int(density * weight.numel())
    m = Scatter(*places(count, 48, 64), torch.empty(count))
    with Observed() as observed:
        found = operator.contract(m, weight, g, x, impl)[-1]
    assert observed.calls == {("scatter", "contract", who): 1}
    exact = reference.contract(
        Scatter(m.rows, m.cols, m.values.double()), weight.double(), g.double(), x.double()
    )
    assert relative_error(found, exact) < 1e-5
