"""Formulas of the methods that PEFT lacks: outputs and gradients are our layer's, in float64."""

import pytest
import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench import contenders, formulas, peers
from decomp_kernels.methods import methods
from decomp_kernels.testing import relative_error

M, K, N = 12, 20, 24


def both(method, bias, dtype=torch.float64, adapter_dtype=None):
    """(our layer, the formula of the same values), away from the start."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    ours = dk.DecomposedLinear(linear, method, dtype=adapter_dtype or dtype)
    contenders.leave_the_start(ours)
    return ours, formulas.of_adapter(linear, ours.adapters["default"], adapter_dtype or dtype)


def step(module, x, dy):
    """y, the gradient of x, and those of what is trained by name."""
    torch.manual_seed(1)  # diff pruning draws its mask
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(dy)
    trained = {name.rpartition(".")[2]: p.grad for name, p in module.named_parameters()}
    return y.detach(), leaf.grad, {n: grad for n, grad in trained.items() if grad is not None}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_outputs_and_gradients_are_ours(name, bias):
    ours, formula = both(methods()[name].small(), bias)
    x, dy = (torch.randn(M, size, dtype=torch.float64) for size in (K, N))
    y, dx, grads = step(ours, x, dy)
    same_y, same_dx, same_grads = step(formula, x, dy)
    assert relative_error(same_y, y) < 1e-11
    assert relative_error(same_dx, dx) < 1e-11
    assert same_grads.keys() == grads.keys()
    for tensor in grads:
        assert relative_error(same_grads[tensor], grads[tensor]) < 1e-10, tensor
        assert grads[tensor].abs().max() > 1e-6, tensor


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_trains_as_many_numbers_and_keeps_the_dtype(name):
    """On a bf16 layer, with adapters of its own dtype and in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        ours, formula = both(methods()[name].small(), True, torch.bfloat16, dtype)
        trained = [p for p in formula.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == sum(
            p.numel() for p in ours.parameters() if p.requires_grad
        )
        assert {p.dtype for p in trained} == {dtype}
        x, dy = (torch.randn(M, size).bfloat16() for size in (K, N))
        y, dx, _ = step(formula, x, dy)
        same_y, same_dx, _ = step(ours, x, dy)
        assert y.dtype == dx.dtype == torch.bfloat16
        assert relative_error(y, same_y) < 0.03  # rounded in other places, to 8 bits
        assert relative_error(dx, same_dx) < 0.03


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_leaves_the_linear_alone_and_starts_at_it(name):
    linear = nn.Linear(K, N, dtype=torch.float64)
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    formula = formulas.at_start(linear, methods()[name].small()).eval()
    x = torch.randn(M, K, dtype=torch.float64)
    assert relative_error(formula(x), linear(x)) < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in linear.state_dict().items())


def test_every_method_has_a_peer_or_a_formula():
    assert {*peers.CONFIGS, *formulas.FORMULAS} == set(methods())
    assert not {*peers.CONFIGS} & {*formulas.FORMULAS}


def test_says_why_there_is_none():
    with pytest.raises(ValueError, match="no formula is written out for lora; the formulas are of"):
        formulas.at_start(nn.Linear(4, 4), dk.LoRA(r=2))
    curved = dk.FLoRA(r=2, activation="relu")
    assert "activation='relu' is ours alone" in formulas.why_not(curved)
