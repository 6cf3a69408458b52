"""W * (1 + s B A) against the formula written out, in every dtype and with every other term."""

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

from decomp_kernels.factors import Hadamard
from decomp_kernels.kernels.aten import hadamard as aten
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.hadamard import build, build_op, contract_op

SCALE = 0.5


def dense(W, up, down):
    """By entries: W'_jk = W_jk + s W_jk sum_i B_ji A_ik."""
    product = torch.einsum("ji,ik->jk", up, down)
    return W + SCALE * W * product


def tensors(N, K, dtype, r=3):
    adapter = DTYPES[dtype][1]
    return {
        "up": random((N, r), adapter, 20).requires_grad_(),
        "down": random((r, K), adapter, 21).requires_grad_(),
    }


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("shape", [(9, 12), (1, 1), (33, 17), (16, 64)], ids=str)
def test_matches_the_formula(shape, dtype, impl):
    terms = layer(*shape, dtype, terms=("bias",))
    check(Hadamard, dense, tensors(*shape, dtype), terms, impl, scale=SCALE)


@impls
@pytest.mark.parametrize("dtype", ["fp64", "bf16-fp32"])
@pytest.mark.parametrize(
    "terms",
    [("in_scale", "out_scale", "bias"), ("down", "up", "core"), ("addend", "out_scale")],
    ids="+".join,
)
def test_with_the_other_terms(terms, dtype, impl):
    check(
        Hadamard, dense, tensors(9, 12, dtype), layer(9, 12, dtype, terms=terms), impl, scale=SCALE
    )


@impls
@dtypes
def test_is_rounded_once(dtype, impl):
    mapped = tensors(40, 24, dtype)
    weight = random((40, 24), DTYPES[dtype][0], 1)
    check_build(lambda W: build(Hadamard(**mapped, scale=SCALE), W, impl), dense, mapped, weight)


@impls
def test_no_tokens(impl):
    mapped, terms = tensors(9, 12, "fp32"), layer(9, 12, "fp32", tokens=(0,))
    y = decomposed_linear(**terms, weight_map=Hadamard(**mapped), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 9) and not mapped["up"].grad.any() and not mapped["down"].grad.any()


def test_only_x_is_kept_and_no_float32_weight_is_made():
    mapped, terms = tensors(9, 12, "bf16-fp32"), layer(9, 12, "bf16-fp32")
    inputs = [*mapped.values(), *terms.values()]
    assert (
        saved_beyond(inputs, lambda: decomposed_linear(**terms, weight_map=Hadamard(**mapped))) == 0
    )
    N, K = 2048, 1024
    m = Hadamard(**tensors(N, K, "bf16-fp32"))
    W, g, x = (random(shape, torch.bfloat16, 0) for shape in ((N, K), (8, N), (8, K)))
    assert largest_temporary(lambda: aten.build(m, W)) <= N * K // 8
    both = (torch.float32, torch.bfloat16)
    assert largest_temporary(lambda: aten.contract(m, W, g, x), both) <= N * K // 2
    assert largest_temporary(lambda: W.float()) == N * K  # the control


def test_a_trained_base_weight():
    check_trained_weight(Hadamard, dense, tensors(9, 12, "fp64"), scale=SCALE)


@impls
def test_gradcheck(impl):
    mapped, terms = tensors(4, 5, "fp64", r=2), layer(4, 5, "fp64", tokens=(3,))

    def call(x, up, down):
        return decomposed_linear(
            x, terms["weight"], weight_map=Hadamard(up, down, SCALE), impl=impl
        )

    assert torch.autograd.gradcheck(call, (terms["x"], *mapped.values()))


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
def test_registration(dtype, impl):
    base, adapter = DTYPES[dtype]
    W, g, x = random((9, 12), base, 0), random((4, 9), base, 1), random((4, 12), base, 2)
    up, down = random((9, 3), adapter, 3), random((3, 12), adapter, 4)
    torch.library.opcheck(build_op, (W, up, down, 0.5, impl))
    torch.library.opcheck(contract_op, (W, g, x, up, down, 0.5, impl))
    transposed = random((12, 9), base, 0).T
    torch.library.opcheck(build_op, (transposed, up, down, 0.5, impl))


def test_compiles_without_a_graph_break():
    check_compiles(Hadamard, tensors(9, 12, "fp32"), layer(9, 12, "fp32"), scale=SCALE)


def test_says_what_is_wrong():
    mapped, terms = tensors(9, 12, "fp32"), layer(9, 12, "fp32")
    up, down = mapped.values()
    for wrong, error, message in [
        (
            Hadamard(up.T, down),
            ValueError,
            r"up must have shape \[9, r.*\].*\(9, 12\), got \(3, 9\)",
        ),
        (Hadamard(up, down[:2]), ValueError, r"down must have shape \[r = 3, 12\].*got \(2, 12\)"),
        (Hadamard(up[:, 0], down), ValueError, r"up must have shape .* got \(9,\)"),
        (Hadamard(up.double(), down), TypeError, "up must be torch.float32 as the weight is"),
        (Hadamard(up.to("meta"), down), ValueError, "up must be on the weight's device cpu"),
    ]:
        with pytest.raises(error, match=message):
            decomposed_linear(**terms, weight_map=wrong)
