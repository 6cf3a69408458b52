"""W R^T, R a product of permuted block diagonals, against dense matrices written out."""

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

from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels.aten import block_rotate as aten
from decomp_kernels.ops import block_rotate
from decomp_kernels.ops.block_rotate import build, build_op, bwd_op, contract_op, fwd_op
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.testing import relative_error

SHAPES = [  # N, factors, blocks, block size
    (9, 1, 3, 4),
    (7, 3, 2, 6),
    (1, 2, 2, 2),
    (33, 2, 5, 3),
]


def dense(W, blocks, permutations=None):
    """R is built whole, from permutation matrices: column i of P has its 1 in row order[i]."""
    K = W.shape[1]
    R = torch.eye(K, dtype=blocks.dtype)
    for j, factor in enumerate(blocks):
        P = torch.eye(K, dtype=blocks.dtype)
        P = P if permutations is None else P[:, permutations[j]]
        R = R @ (P @ torch.block_diag(*factor) @ P.T)
    return W.to(blocks.dtype) @ R.T


def tensors(shape, dtype, permuted=True):
    """Far from rotations on purpose: nothing here may rest on the blocks being orthogonal."""
    _, m, q, b = shape
    generator = torch.Generator().manual_seed(5)
    blocks = torch.eye(b) + random((m, q, b, b), torch.float64, 20, size=0.6)
    made = {"blocks": blocks.to(DTYPES[dtype][1]).requires_grad_()}
    if permuted:
        orders = [order(q * b, generator) for _ in range(m)]
        made["permutations"] = torch.stack(orders)
    return made


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "in-order"])
@pytest.mark.parametrize("tokens", [(3, 13), (2, 3)], ids=["weight", "x"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(shape, tokens, permuted, dtype, impl):
    """With fewer tokens than rows of W it is x that is turned."""
    N, _, q, b = shape
    terms = layer(N, q * b, dtype, tokens, terms=("bias", "out_scale"))
    check(BlockRotate, dense, tensors(shape, dtype, permuted), terms, impl)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "bf16-fp32"])
@pytest.mark.parametrize("tokens", [(3, 5), (2, 3)], ids=["many", "few"])
@pytest.mark.parametrize(
    "terms",
    [("in_scale", "out_scale", "bias"), ("down", "up", "core"), ("addend",)],
    ids="+".join,
)
def test_with_the_other_terms(terms, tokens, dtype, impl):
    """in_scale and a branch add to the gradient of x: the map's own must not see that."""
    mapped, others = tensors((9, 2, 3, 4), dtype), layer(9, 12, dtype, tokens, terms=terms)
    check(BlockRotate, dense, mapped, others, impl)


@impls
def test_singular_blocks_have_right_gradients(impl):
    """A Cayley-Neumann block is singular where an eigenvalue of its skew matrix is i."""
    mapped, terms = tensors((9, 2, 3, 4), "fp64"), layer(9, 12, "fp64")
    with torch.no_grad():
        mapped["blocks"][:, 1, :, 0] = 0
    check(BlockRotate, dense, mapped, terms, impl)


@impls
@pytest.mark.parametrize("wanted", ["x", "blocks"])
def test_one_gradient_alone(wanted, impl):
    mapped, terms = tensors((9, 2, 3, 4), "fp64"), layer(9, 12, "fp64")
    leaves = {**terms, **mapped}
    y = decomposed_linear(**terms, weight_map=BlockRotate(**mapped), impl=impl)
    expected = torch.autograd.grad(y.square().sum(), leaves[wanted])[0]
    for name, tensor in leaves.items():
        if tensor.is_floating_point():
            tensor.requires_grad_(name == wanted)
    y = decomposed_linear(**terms, weight_map=BlockRotate(**mapped), impl=impl)
    assert (
        relative_error(torch.autograd.grad(y.square().sum(), leaves[wanted])[0], expected) < 1e-13
    )


@impls
@dtypes
def test_is_rounded_once(dtype, impl):
    mapped, weight = tensors((40, 2, 6, 4), dtype), random((40, 24), DTYPES[dtype][0], 1)
    check_build(lambda W: build(BlockRotate(**mapped), W, impl), dense, mapped, weight)


@impls
def test_no_tokens(impl):
    mapped, terms = tensors((9, 2, 3, 4), "fp32"), layer(9, 12, "fp32", tokens=(0,))
    y = decomposed_linear(**terms, weight_map=BlockRotate(**mapped), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 9) and not mapped["blocks"].grad.any()


def test_only_x_is_kept_and_no_float32_weight_is_made():
    mapped, terms = tensors((9, 2, 3, 4), "bf16-fp32"), layer(9, 12, "bf16-fp32")
    inputs = [*mapped.values(), *terms.values()]
    m = BlockRotate(**mapped)
    assert saved_beyond(inputs, lambda: decomposed_linear(**terms, weight_map=m)) == 0
    N, K = 2048, 1024
    m = BlockRotate(**tensors((N, 2, K // 8, 8), "bf16-fp32"))
    W = random((N, K), torch.bfloat16, 0)
    assert largest_temporary(lambda: aten.build(m, W)) <= N * K // 8
    assert largest_temporary(lambda: aten.backward(m, W, W)) <= N * K // 8


def test_a_trained_base_weight():
    check_trained_weight(BlockRotate, dense, tensors((9, 2, 3, 4), "fp64"))


@impls
def test_gradcheck(impl):
    mapped, terms = tensors((4, 2, 3, 2), "fp64"), layer(4, 6, "fp64", tokens=(3,))

    def call(x, blocks):
        m = BlockRotate(blocks, mapped["permutations"])
        return decomposed_linear(x, terms["weight"], weight_map=m, impl=impl)

    assert torch.autograd.gradcheck(call, (terms["x"], mapped["blocks"]))


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "in-order"])
def test_registration(permuted, dtype, impl):
    base = DTYPES[dtype][0]
    W, g, x = random((9, 12), base, 0), random((4, 9), base, 1), random((4, 12), base, 2)
    mapped = tensors((9, 2, 3, 4), dtype, permuted)
    blocks, orders = mapped["blocks"].detach(), mapped.get("permutations")
    torch.library.opcheck(build_op, (W, blocks, orders, impl))
    torch.library.opcheck(build_op, (random((12, 9), base, 0).T, blocks, orders, impl))
    torch.library.opcheck(fwd_op, (random((2, 3, 12), base, 3), blocks, orders, impl))
    torch.library.opcheck(contract_op, (W, g, x, blocks, orders, impl))
    torch.library.opcheck(bwd_op, (random((4, 12), base, 3), x, blocks, orders, impl))


@pytest.mark.parametrize("terms", [(), ("in_scale",)], ids=["rotates-back", "contracts"])
@pytest.mark.parametrize("tokens", [(3, 5), (2, 3)], ids=["weight", "x"])
def test_compiles_without_a_graph_break(tokens, terms):
    others = layer(9, 12, "fp32", tokens, terms=terms)
    check_compiles(BlockRotate, tensors((9, 2, 3, 4), "fp32"), others)


def test_which_side_is_turned(monkeypatch):
    calls = []
    for name in ("forward", "build", "contract", "backward"):
        wrapped = getattr(block_rotate, name)
        monkeypatch.setattr(
            block_rotate, name, lambda *a, w=wrapped, n=name: calls.append(n) or w(*a)
        )
    for tokens, terms, expected in [
        ((8,), (), ["forward", "backward"]),
        ((9,), (), ["build", "backward"]),
        ((8,), ("in_scale",), ["build", "build", "contract"]),
    ]:
        calls.clear()
        others = layer(9, 12, "fp32", tokens, terms=terms)
        mapped = tensors((9, 2, 3, 4), "fp32")
        decomposed_linear(**others, weight_map=BlockRotate(**mapped)).sum().backward()
        assert calls == expected


def test_shared_blocks_add_their_gradients():
    """One block expanded to all positions: its gradient is the sum over them."""
    one = random((1, 1, 4, 4), torch.float64, 3).requires_grad_()
    terms = layer(9, 12, "fp64")
    m = BlockRotate(one.expand(1, 3, 4, 4))
    dy = random((3, 5, 9), torch.float64, 7)
    ours = torch.autograd.grad(decomposed_linear(**terms, weight_map=m), one, dy)[0]
    turned = terms["x"].unflatten(-1, (3, 4)) @ one[0, 0]
    plain = torch.autograd.grad(turned.flatten(-2) @ terms["weight"].T, one, dy)[0]
    assert relative_error(ours, plain) < 1e-13


def test_says_what_is_wrong():
    terms = layer(9, 12, "fp32")
    for wrong, error, message in [
        (BlockRotate(torch.ones(1, 3, 3, 3)), ValueError, r"q \* b = K = 12 .*got \(1, 3, 3, 3\)"),
        (BlockRotate(torch.ones(1, 3, 4, 3)), ValueError, r"\[m = 1, q = 3, b = 4, b = 4\].*got"),
        (BlockRotate(torch.ones(3, 4, 4)), ValueError, "blocks must have shape"),
        (
            BlockRotate(torch.ones(1, 3, 4, 4), torch.zeros(2, 12, dtype=torch.int64)),
            ValueError,
            r"permutations must have shape \[m = 1, 12\]",
        ),
        (
            BlockRotate(torch.ones(1, 3, 4, 4), torch.zeros(1, 12)),
            TypeError,
            "permutations must be int64",
        ),
    ]:
        with pytest.raises(error, match=message):
            decomposed_linear(**terms, weight_map=wrong)
