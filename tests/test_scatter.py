"""W with values added at given positions, by both ways to the gradient, against a dense sum."""

import pytest
import torch
from weight_maps import (
    DTYPES,
    check,
    check_build,
    check_compiles,
    check_trained_weight,
    dtypes,
    impls,
    largest_temporary,
    layer,
    order,
    random,
    saved_beyond,
    small_blocks,  # noqa: F401
)

from decomp_kernels.factors import Scatter
from decomp_kernels.kernels.aten import scatter as aten
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.scatter import build, build_op, contract_op
from decomp_kernels.testing import relative_error


def dense(W, rows, cols, values):
    """By selection matrices: S_rows^T diag(values) S_cols."""
    left, right = (
        torch.eye(size, dtype=values.dtype)[at] for size, at in zip(W.shape, (rows, cols))
    )
    return W + left.T @ (values[:, None] * right)


def tensors(N, K, dtype, count=20):
    """Positions in no order, none twice."""
    places = order(N * K, torch.Generator().manual_seed(4))[:count]
    values = random((len(places),), DTYPES[dtype][1], 20, size=2.0)
    return {"rows": places // K, "cols": places % K, "values": values.requires_grad_()}


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("shape", [(9, 12), (1, 1), (33, 17), (16, 64)], ids=str)
def test_matches_the_formula(shape, dtype, impl):
    terms = layer(*shape, dtype, terms=("bias",))
    check(Scatter, dense, tensors(*shape, dtype), terms, impl)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "bf16-fp32"])
@pytest.mark.parametrize(
    "terms",
    [("in_scale", "out_scale", "bias"), ("down", "up", "core"), ("addend", "out_scale")],
    ids="+".join,
)
def test_with_the_other_terms(terms, dtype, impl):
    check(Scatter, dense, tensors(9, 12, dtype), layer(9, 12, dtype, terms=terms), impl)


@pytest.mark.usefixtures("small_blocks")
@dtypes
@pytest.mark.parametrize("count", [3, 150], ids=["dot-products", "blocks"])
def test_both_ways_to_the_gradient(count, dtype, monkeypatch):
    N, K, M = 24, 32, 11
    base = DTYPES[dtype][0]
    monkeypatch.setattr(aten, "_by_blocks" if count == 3 else "_by_dot_products", None)
    mapped = tensors(N, K, dtype, count)
    W, g, x = (random(s, base, i) for i, s in enumerate([(N, K), (M, N), (M, K)]))
    exact = (g.double().T @ x.double())[mapped["rows"], mapped["cols"]]
    error = relative_error(aten.contract(Scatter(**mapped), W, g, x), exact)
    assert error < (1e-14 if dtype == "fp64" else torch.finfo(base).eps)


@impls
@dtypes
def test_is_rounded_once(dtype, impl):
    mapped, weight = tensors(40, 24, dtype), random((40, 24), DTYPES[dtype][0], 1)
    check_build(lambda W: build(Scatter(**mapped), W, impl), dense, mapped, weight)


@impls
def test_no_tokens_and_no_values(impl):
    mapped, terms = tensors(9, 12, "fp32"), layer(9, 12, "fp32", tokens=(0,))
    y = decomposed_linear(**terms, weight_map=Scatter(**mapped), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 9) and not mapped["values"].grad.any()
    mapped, terms = tensors(9, 12, "fp32", count=0), layer(9, 12, "fp32")
    y = decomposed_linear(**terms, weight_map=Scatter(**mapped), impl=impl)
    y.sum().backward()
    torch.testing.assert_close(y, terms["x"] @ terms["weight"].T)
    assert mapped["values"].grad.shape == (0,)


def test_only_x_is_kept_and_no_whole_gradient_is_made():
    mapped, terms = tensors(9, 12, "bf16-fp32"), layer(9, 12, "bf16-fp32")
    m = Scatter(**mapped)
    inputs = [*mapped.values(), *terms.values()]
    assert saved_beyond(inputs, lambda: decomposed_linear(**terms, weight_map=m)) == 0
    N, K = 2048, 1024
    W, g, x = (random(shape, torch.bfloat16, 0) for shape in ((N, K), (8, N), (8, K)))
    both = (torch.float32, torch.bfloat16)
    for count in (N * K // 1024, N * K // 64):
        m = Scatter(**tensors(N, K, "bf16-fp32", count))
        assert largest_temporary(lambda m=m: aten.build(m, W)) <= N * K // 2
        assert largest_temporary(lambda m=m: aten.contract(m, W, g, x), both) <= N * K // 2


def test_a_trained_base_weight():
    check_trained_weight(Scatter, dense, tensors(9, 12, "fp64"))


@impls
def test_gradcheck(impl):
    mapped, terms = tensors(4, 5, "fp64", count=6), layer(4, 5, "fp64", tokens=(3,))

    def call(x, values):
        m = Scatter(mapped["rows"], mapped["cols"], values)
        return decomposed_linear(x, terms["weight"], weight_map=m, impl=impl)

    assert torch.autograd.gradcheck(call, (terms["x"], mapped["values"]))


@impls
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
def test_registration(dtype, count, impl):
    base = DTYPES[dtype][0]
    W, g, x = random((12, 24), base, 0), random((4, 12), base, 1), random((4, 24), base, 2)
    mapped = [t.detach() for t in tensors(12, 24, dtype, count).values()]
    torch.library.opcheck(build_op, (W, *mapped, impl))
    torch.library.opcheck(build_op, (random((24, 12), base, 0).T, *mapped, impl))
    torch.library.opcheck(contract_op, (W, g, x, *mapped, impl))


def test_compiles_without_a_graph_break():
    check_compiles(Scatter, tensors(9, 12, "fp32"), layer(9, 12, "fp32"))


def test_says_what_is_wrong():
    rows, cols, values = tensors(9, 12, "fp32").values()
    terms = layer(9, 12, "fp32")
    for wrong, error, message in [
        (Scatter(rows, cols[:3], values), ValueError, r"cols must have shape \[n = 20\].*\(3,\)"),
        (Scatter(rows.int(), cols, values), TypeError, "rows must be int64, got torch.int32"),
    ]:
        with pytest.raises(error, match=message):
            decomposed_linear(**terms, weight_map=wrong)
