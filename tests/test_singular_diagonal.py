"""W + U diag(d) V^T, by the weight and by the activations, against the formula written out."""

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
    random,
    saved_beyond,
    small_blocks,  # noqa: F401
)

from decomp_kernels.factors import SingularDiagonal
from decomp_kernels.kernels import gemm
from decomp_kernels.kernels.aten import singular_diagonal as aten
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.singular_diagonal import as_low_rank, build, build_op, contract_op
from decomp_kernels.testing import relative_error

MANY, FEW = (4, 5), (3,)  # tokens: more and fewer than k, the two routes


def dense(W, left, diagonal, right):
    return W + left @ (torch.diag(diagonal) @ right.to(diagonal.dtype)).to(left.dtype)


def tensors(N, K, dtype, k=7):
    base, adapter = DTYPES[dtype]
    return {
        "left": random((N, k), adapter, 20),
        "diagonal": random((k,), torch.promote_types(base, torch.float32), 21).requires_grad_(),
        "right": random((k, K), adapter, 22),
    }


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("tokens", [MANY, FEW], ids=["weight", "activations"])
@pytest.mark.parametrize("shape", [(9, 12), (33, 17), (16, 64)], ids=str)
def test_matches_the_formula(shape, tokens, dtype, impl):
    terms = layer(*shape, dtype, tokens, terms=("bias",))
    check(SingularDiagonal, dense, tensors(*shape, dtype), terms, impl)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "bf16-fp32"])
@pytest.mark.parametrize("tokens", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize(
    "terms",
    [("in_scale", "out_scale", "bias"), ("down", "up", "core"), ("addend", "out_scale")],
    ids="+".join,
)
def test_with_the_other_terms(terms, tokens, dtype, impl):
    """A branch of its own keeps the map a weight; otherwise few tokens make it the branch."""
    mapped, others = tensors(9, 12, dtype), layer(9, 12, dtype, tokens, terms=terms)
    check(SingularDiagonal, dense, mapped, others, impl)


def test_the_activation_route_takes_nothing_from_the_options_of_a_branch():
    """scale, dropout and activation are a branch's: without one they mean nothing."""
    mapped, terms = tensors(9, 12, "fp64"), layer(9, 12, "fp64", FEW)
    m = SingularDiagonal(**mapped)
    plain = decomposed_linear(**terms, weight_map=m)
    other = decomposed_linear(**terms, weight_map=m, scale=3.0, dropout=0.5, activation="relu")
    assert torch.equal(plain, other)
    assert relative_error(plain, terms["x"] @ dense(terms["weight"], **mapped).T) < 1e-13


def test_routes():
    """Fewer tokens than k: a branch whose x is not kept.  More: a weight, and x is."""
    mapped = tensors(9, 12, "fp64")
    m = SingularDiagonal(**mapped)
    assert as_low_rank(m, 7) is None
    assert [t.shape for t in as_low_rank(m, 6)] == [(7, 12), (9, 7), (7,)]
    many, few = layer(9, 12, "fp64", MANY), layer(9, 12, "fp64", FEW)
    for terms, kept in ((many, 0), (few, 3 * 7)):  # beside x: t [tokens, k] for the gradient of d
        inputs = [*mapped.values(), *terms.values()]
        assert saved_beyond(inputs, lambda t=terms: decomposed_linear(**t, weight_map=m)) == kept


@pytest.mark.usefixtures("small_blocks")
@dtypes
@pytest.mark.parametrize("M", [2, 60], ids=["by-tokens", "by-weight"])
def test_both_ways_to_the_gradient(M, dtype, monkeypatch):
    base = DTYPES[dtype][0]
    N, K, k = 9, 12, 7
    by_tokens = M * k * (N + K) <= N * K * (M + k)
    assert by_tokens == (M == 2)
    unused = "_from_weight" if by_tokens else "_from_tokens"
    monkeypatch.setattr(aten, unused, None)
    mapped = tensors(N, K, dtype)
    m = SingularDiagonal(**mapped)
    W, g, x = (random(s, base, i) for i, s in enumerate([(N, K), (M, N), (M, K)]))
    P = g.double().T @ x.double()
    exact = torch.einsum("ji,jk,ik->i", mapped["left"].double(), P, mapped["right"].double())
    error = relative_error(aten.contract(m, W, g, x), exact)
    assert error < (1e-13 if dtype == "fp64" else 2 * torch.finfo(base).eps)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16-fp32", "fp16-fp32"])
def test_is_rounded_once(dtype, impl):
    mapped, weight = tensors(40, 24, dtype), random((40, 24), DTYPES[dtype][0], 1)
    m = SingularDiagonal(**mapped)
    check_build(lambda W: build(m, W, impl), dense, mapped, weight)


@impls
def test_no_tokens(impl):
    mapped, terms = tensors(9, 12, "fp32"), layer(9, 12, "fp32", tokens=(0,))
    y = decomposed_linear(**terms, weight_map=SingularDiagonal(**mapped), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 9) and not mapped["diagonal"].grad.any()


@pytest.mark.parametrize("dtype", ["bf16", "bf16-fp32"])
def test_no_float32_weight_is_made(dtype, monkeypatch):
    """Nor one of a 16-bit basis, which is as large."""
    monkeypatch.setattr(gemm, "OUTER_ELEMENTS", 1 << 16)
    monkeypatch.setattr(gemm.outer_blocks, "__defaults__", (1 << 16,))
    N = K = k = 512
    m = SingularDiagonal(**tensors(N, K, dtype, k))
    W, g, x = (random(shape, torch.bfloat16, 0) for shape in ((N, K), (600, N), (600, K)))
    assert largest_temporary(lambda: aten.build(m, W)) <= N * K // 4
    assert largest_temporary(lambda: aten.contract(m, W, g, x)) <= N * K // 4
    few = (torch.float32, torch.bfloat16)
    assert largest_temporary(lambda: aten.contract(m, W, g[:8], x[:8]), few) <= N * K // 4


def test_a_trained_base_weight():
    check_trained_weight(SingularDiagonal, dense, tensors(9, 12, "fp64"))


@impls
@pytest.mark.parametrize("tokens", [MANY, FEW], ids=["weight", "activations"])
def test_gradcheck(tokens, impl):
    mapped, terms = tensors(4, 5, "fp64", k=4), layer(4, 5, "fp64", tokens)

    def call(x, diagonal):
        m = SingularDiagonal(mapped["left"], diagonal, mapped["right"])
        return decomposed_linear(x, terms["weight"], weight_map=m, impl=impl)

    assert torch.autograd.gradcheck(call, (terms["x"], mapped["diagonal"]))


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32"])
def test_registration(dtype, impl):
    base = DTYPES[dtype][0]
    W, g, x = random((9, 12), base, 0), random((4, 9), base, 1), random((4, 12), base, 2)
    mapped = [t.detach() for t in tensors(9, 12, dtype).values()]
    torch.library.opcheck(build_op, (W, *mapped, impl))
    torch.library.opcheck(build_op, (random((12, 9), base, 0).T, *mapped, impl))
    torch.library.opcheck(contract_op, (W, g, x, *mapped, impl))


@pytest.mark.parametrize("tokens", [MANY, FEW], ids=["weight", "activations"])
def test_compiles_without_a_graph_break(tokens):
    check_compiles(SingularDiagonal, tensors(9, 12, "fp32"), layer(9, 12, "fp32", tokens))


def test_says_what_is_wrong():
    left, diagonal, right = tensors(9, 12, "fp32").values()
    terms = layer(9, 12, "fp32")
    for wrong, error, message in [
        ((left, diagonal[:3], right), ValueError, r"diagonal must have shape \[k = 7\].*\(3,\)"),
        ((left, diagonal, right.T), ValueError, r"right must have shape \[k = 7, 12\]"),
        ((left.requires_grad_(), diagonal, right), ValueError, "are frozen: detach them"),
    ]:
        with pytest.raises(error, match=message):
            decomposed_linear(**terms, weight_map=SingularDiagonal(*wrong))
    half = {k: v.detach() for k, v in tensors(9, 12, "bf16").items()}
    half["right"] = half["right"].float()
    with pytest.raises(TypeError, match="left and right must have one dtype"):
        decomposed_linear(**layer(9, 12, "bf16"), weight_map=SingularDiagonal(**half))
