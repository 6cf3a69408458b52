"""W + s (B1 A1) * (B2 A2) against the formula written out, in every dtype and with every term."""

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

from decomp_kernels.factors import DoubleHadamard
from decomp_kernels.kernels.aten import double_hadamard as aten
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.double_hadamard import build, build_op, contract_op

SCALE = 0.5


def dense(W, up1, down1, up2, down2):
    """By entries, as FedPara has it: the sum over both ranks of a rank-one product."""
    change = torch.einsum("ja,ak,jb,bk->jk", up1, down1, up2, down2)
    return W + SCALE * change


def tensors(N, K, dtype, r1=3, r2=2):
    adapter = DTYPES[dtype][1]
    shapes = {"up1": (N, r1), "down1": (r1, K), "up2": (N, r2), "down2": (r2, K)}
    return {
        name: random(shape, adapter, 20 + seed).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("shape", [(9, 12), (1, 1), (33, 17), (16, 64)], ids=str)
def test_matches_the_formula(shape, dtype, impl):
    terms = layer(*shape, dtype, terms=("bias",))
    check(DoubleHadamard, dense, tensors(*shape, dtype), terms, impl, scale=SCALE)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "bf16-fp32"])
@pytest.mark.parametrize(
    "terms",
    [("in_scale", "out_scale", "bias"), ("down", "up", "core"), ("addend", "out_scale")],
    ids="+".join,
)
def test_with_the_other_terms(terms, dtype, impl):
    mapped, others = tensors(9, 12, dtype), layer(9, 12, dtype, terms=terms)
    check(DoubleHadamard, dense, mapped, others, impl, scale=SCALE)


@impls
@dtypes
def test_is_rounded_once(dtype, impl):
    mapped, weight = tensors(40, 24, dtype), random((40, 24), DTYPES[dtype][0], 1)
    m = DoubleHadamard(**mapped, scale=SCALE)
    check_build(lambda W: build(m, W, impl), dense, mapped, weight)


@impls
def test_no_tokens(impl):
    mapped, terms = tensors(9, 12, "fp32"), layer(9, 12, "fp32", tokens=(0,))
    y = decomposed_linear(**terms, weight_map=DoubleHadamard(**mapped), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 9) and not any(t.grad.any() for t in mapped.values())


def test_only_x_is_kept_and_no_float32_weight_is_made():
    mapped, terms = tensors(9, 12, "bf16-fp32"), layer(9, 12, "bf16-fp32")
    m = DoubleHadamard(**mapped)
    inputs = [*mapped.values(), *terms.values()]
    assert saved_beyond(inputs, lambda: decomposed_linear(**terms, weight_map=m)) == 0
    N, K = 2048, 1024
    m = DoubleHadamard(**tensors(N, K, "bf16-fp32"))
    W, g, x = (random(shape, torch.bfloat16, 0) for shape in ((N, K), (8, N), (8, K)))
    assert largest_temporary(lambda: aten.build(m, W)) <= N * K // 8
    both = (torch.float32, torch.bfloat16)
    assert largest_temporary(lambda: aten.contract(m, W, g, x), both) <= N * K // 2


def test_a_trained_base_weight():
    check_trained_weight(DoubleHadamard, dense, tensors(9, 12, "fp64"), scale=SCALE)


@impls
def test_gradcheck(impl):
    mapped, terms = tensors(4, 5, "fp64", 2, 1), layer(4, 5, "fp64", tokens=(3,))

    def call(x, *values):
        m = DoubleHadamard(*values, SCALE)
        return decomposed_linear(x, terms["weight"], weight_map=m, impl=impl)

    assert torch.autograd.gradcheck(call, (terms["x"], *mapped.values()))


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
def test_registration(dtype, impl):
    base = DTYPES[dtype][0]
    W, g, x = random((9, 12), base, 0), random((4, 9), base, 1), random((4, 12), base, 2)
    mapped = [t.detach() for t in tensors(9, 12, dtype).values()]
    torch.library.opcheck(build_op, (W, *mapped, 0.5, impl))
    torch.library.opcheck(contract_op, (W, g, x, *mapped, 0.5, impl))
    torch.library.opcheck(build_op, (random((12, 9), base, 0).T, *mapped, 0.5, impl))


def test_compiles_without_a_graph_break():
    check_compiles(DoubleHadamard, tensors(9, 12, "fp32"), layer(9, 12, "fp32"), scale=SCALE)


def test_says_what_is_wrong():
    up1, down1, up2, down2 = tensors(9, 12, "fp32").values()
    terms = layer(9, 12, "fp32")
    with pytest.raises(ValueError, match=r"down1 must have shape \[r1 = 3, 12\].*got \(2, 12\)"):
        decomposed_linear(**terms, weight_map=DoubleHadamard(up1, down2, up2, down1))
    with pytest.raises(TypeError, match="up2 must be torch.float32 as the weight is"):
        decomposed_linear(**terms, weight_map=DoubleHadamard(up1, down1, up2.half(), down2))
