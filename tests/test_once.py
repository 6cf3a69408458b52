"""Second derivatives raise, never pass as zero, and the first are those of the plain formula."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import decomp_kernels as dk
from decomp_kernels.methods.base import METHODS
from decomp_kernels.ops.dropout import counter_dropout
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.ops.row_norm import row_norm
from decomp_kernels.testing import relative_error

REFUSED = "once_differentiable|differentiate twice"


class Product(torch.autograd.Function):
    """a * b."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        return dy * b, dy * a


def refuse(output, leaf):
    """The sum's own gradient needs no gradient: torch's decorator does not see this case."""
    (grad,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        grad.sum().backward()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_refuses(name):
    layer = dk.DecomposedLinear(nn.Linear(24, 40), METHODS[name].small())
    x = torch.randn(3, 24, requires_grad=True)
    refuse(layer(x), x)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_part_of_a_second_derivative_passes_for_the_whole(name):
    """autograd.grad runs only what leads to the tensors that it is asked for."""
    layer = dk.DecomposedLinear(nn.Linear(24, 40), METHODS[name].small())
    x = torch.randn(3, 24, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = checkpoint(layer, torch.tanh(x), use_reentrant=False).square().sum()
    grads = torch.autograd.grad(y, leaves, create_graph=True)
    total = sum(grad.square().sum() for grad in grads)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)


def test_operators_refuse():
    a, b = (torch.randn(3, requires_grad=True) for _ in range(2))
    refuse(Product.apply(a, b), a)
    down, up = torch.randn(2, 12, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    refuse(row_norm(torch.randn(9, 12), down, up), down)
    refuse(counter_dropout(down, 0.3), down)


def test_first_derivatives_are_the_same_with_and_without_a_graph():
    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for create_graph in (False, True):
        d_a, d_b = torch.autograd.grad(Product.apply(a, b).sum(), (a, b), create_graph=create_graph)
        assert relative_error(d_a, b) == relative_error(d_b, a) == 0.0
        assert d_a.requires_grad == create_graph


def test_a_graph_that_is_made_and_not_used_does_no_harm():
    layer = dk.DecomposedLinear(nn.Linear(12, 9), dk.LoRA(r=2))
    x = torch.randn(3, 12, requires_grad=True)
    (with_graph,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, with_graph)
