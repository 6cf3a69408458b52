"""x (C kron D)^T against the Kronecker product formed, and W U with W frozen."""

import pytest
import torch
from weight_maps import (
    DTYPES,
    dtypes,
    impls,
    largest_temporary,
    random,
    saved_beyond,
    small_blocks,  # noqa: F401
)

from decomp_kernels.kernels.aten import kron as aten
from decomp_kernels.ops import frozen_matmul as frozen
from decomp_kernels.ops.frozen_matmul import frozen_matmul
from decomp_kernels.ops.kron import bwd, fwd, kron_linear
from decomp_kernels.testing import assert_as_good_as, relative_error

SHAPES = [(2, 3, 4, 5), (1, 1, 1, 1), (3, 1, 1, 7), (8, 4, 4, 16)]  # a, b, c, d


def tensors(shape, dtype, tokens=(3, 5)):
    a, b, c, d = shape
    base, adapter = DTYPES[dtype]
    sizes = {"x": ((*tokens, b * d), base), "left": ((a, b), adapter), "right": ((c, d), adapter)}
    return {
        name: random(size, kind, seed).requires_grad_()
        for seed, (name, (size, kind)) in enumerate(sizes.items())
    }


def formed(x, left, right):
    """Entry ((i, k), (j, l)) of the product is C_ij D_kl."""
    product = torch.einsum("ij,kl->ikjl", left, right).flatten(2).flatten(0, 1)
    return (x.to(left.dtype) @ product.T).to(x.dtype)


def outcome(y, t, dy):
    return dict(zip(("y", *t), (y, *torch.autograd.grad(y, list(t.values()), dy))))


@pytest.mark.usefixtures("small_blocks")
@impls
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_product(shape, dtype, impl):
    low = tensors(shape, dtype)
    high = {k: v.detach().double().requires_grad_() for k, v in low.items()}
    y = kron_linear(**low, impl=impl)
    dy = random(y.shape, y.dtype, 9)
    ours, plain = outcome(y, low, dy), outcome(formed(**low), low, dy)
    truth = outcome(formed(**high), high, dy.double())
    for name, value in ours.items():
        if value.dtype == torch.float64:
            assert relative_error(value, truth[name]) < 1e-13, name
        else:
            assert value.dtype == (low | {"y": low["x"]})[name].dtype
            assert_as_good_as(value, plain[name], truth[name], name, low["x"].dtype)


@pytest.mark.usefixtures("small_blocks")
def test_float32_factors_keep_float32_precision():
    t = tensors((8, 4, 4, 16), "bf16-fp32", tokens=(64,))
    high = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    y = kron_linear(**t)
    dy = random(y.shape, y.dtype, 9)
    ours, truth = outcome(y, t, dy), outcome(formed(**high), high, dy.double())
    assert relative_error(ours["left"], truth["left"]) < 1e-6
    assert relative_error(ours["right"], truth["right"]) < 1e-6
    narrow = {k: v.detach().bfloat16().requires_grad_() for k, v in t.items()}
    rounded = outcome(kron_linear(**narrow), narrow, dy)
    assert relative_error(rounded["left"], truth["left"]) > 1e-4  # the control


@impls
def test_leading_dimensions_and_strides(impl):
    t = {k: v.detach() for k, v in tensors((2, 3, 4, 5), "fp64").items()}
    y = kron_linear(**t, impl=impl)
    assert y.shape == (3, 5, 8)
    one = kron_linear(t["x"][0, 0], t["left"], t["right"], impl=impl)
    assert relative_error(one, y[0, 0]) < 1e-14
    none = kron_linear(t["x"][:, :0].requires_grad_(), t["left"], t["right"], impl=impl)
    none.sum().backward()
    assert none.shape == (3, 0, 8)
    strided = t["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert relative_error(kron_linear(strided, t["left"], t["right"], impl=impl), y) < 1e-14
    grown = t["left"].requires_grad_()
    kron_linear(t["x"], grown, t["right"].T.contiguous().T, impl=impl).sum().backward()  # stride 0
    expected = torch.autograd.grad(formed(t["x"], grown, t["right"]).sum(), grown)[0]
    assert relative_error(grown.grad, expected) < 1e-13


def test_x_is_kept_for_the_factors_alone():
    t = tensors((2, 3, 4, 5), "fp32")
    assert saved_beyond(t.values(), lambda: kron_linear(**t)) == 0
    x = t["x"] * 1
    left, right = t["left"].detach(), t["right"].detach()
    assert saved_beyond([left, right], lambda: kron_linear(x, left, right)) == 0
    a, b, c, d = 32, 32, 32, 32
    x, left, right = (random(s, torch.float32, 0) for s in ((4, b * d), (a, b), (c, d)))
    assert largest_temporary(lambda: aten.forward(x, left, right)) < a * b * c * d // 100


@impls
def test_gradcheck(impl):
    t = tensors((2, 3, 4, 2), "fp64", tokens=(3,))
    assert torch.autograd.gradcheck(lambda *v: kron_linear(*v, impl=impl), tuple(t.values()))


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
def test_registration(dtype, impl):
    t = [v.detach() for v in tensors((2, 3, 4, 5), dtype).values()]
    torch.library.opcheck(fwd, (*t, impl))
    dy = random((3, 5, 8), t[0].dtype, 4)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        torch.library.opcheck(bwd, (dy, *t, needs, impl))
    torch.library.opcheck(bwd, (dy, None, *t[1:], [True, False, False], impl))


def test_compiles_without_a_graph_break():
    t = tensors((2, 3, 4, 5), "fp32")
    dy = torch.randn(3, 5, 8)
    expected = outcome(kron_linear(**t), t, dy)
    compiled = torch.compile(kron_linear, fullgraph=True, backend="aot_eager")
    for name, value in outcome(compiled(**t), t, dy).items():
        torch.testing.assert_close(value, expected[name])


def test_under_autocast():
    t = tensors((2, 3, 4, 5), "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_linear(**t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in t.values())
    assert relative_error(y, formed(**t)) < torch.finfo(torch.bfloat16).eps


def test_says_what_is_wrong():
    t = tensors((2, 3, 4, 5), "fp32")
    with pytest.raises(
        ValueError, match=r"x must end in 3 \* 5 = 15 columns.*got shape \(3, 5, 14\)"
    ):
        kron_linear(t["x"][..., 1:], t["left"], t["right"])
    with pytest.raises(ValueError, match=r"left must be a matrix, got shape \(6,\)"):
        kron_linear(t["x"], t["left"].flatten(), t["right"])
    with pytest.raises(TypeError, match="left and right must be torch.float32 as x is"):
        kron_linear(t["x"], t["left"].half(), t["right"])
    with pytest.raises(ValueError, match="right must be on x's device cpu"):
        kron_linear(t["x"], t["left"], t["right"].to("meta"))
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        (d_x,) = torch.autograd.grad(kron_linear(**t).sum(), t["x"], create_graph=True)
        d_x.sum().backward()


@pytest.mark.usefixtures("small_blocks")
@dtypes
def test_frozen_matmul(dtype):
    """W U: a float32 U on a 16-bit W keeps float32 precision, and nothing but W is kept."""
    base, adapter = DTYPES[dtype]
    W, U = random((9, 12), base, 0), random((12, 3), adapter, 1).requires_grad_()
    y = frozen_matmul(W, U)
    dy = random((9, 3), adapter, 2)
    d_U = torch.autograd.grad(y, U, dy)[0]
    assert y.dtype == d_U.dtype == adapter
    bound = {torch.float64: 1e-14, torch.float32: 1e-6}.get(adapter, 2 * torch.finfo(base).eps)
    assert relative_error(y, W.double() @ U.double()) < bound
    assert relative_error(d_U, W.double().T @ dy.double()) < bound
    assert saved_beyond([W, U], lambda: frozen_matmul(W, U)) == 0
    torch.library.opcheck(frozen.fwd, (W, None, "dense", U.detach()))
    torch.library.opcheck(frozen.bwd, (W, None, "dense", dy))


def test_frozen_matmul_of_a_trained_weight_and_wrong_shapes():
    W = random((9, 12), torch.float64, 0).requires_grad_()
    U = random((12, 3), torch.float64, 1).requires_grad_()
    assert torch.autograd.gradcheck(frozen_matmul, (W, U))
    assert torch.autograd.gradcheck(frozen_matmul, (W.detach(), U))
    with pytest.raises(ValueError, match=r"right must be \[K, r\].*got \(3, 12\) for \(9, 12\)"):
        frozen_matmul(W, U.T)
    with pytest.raises(TypeError, match="right must be torch.float64 or"):
        frozen_matmul(W, U.float())
    compiled = torch.compile(frozen_matmul, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(W.detach(), U), W @ U)
