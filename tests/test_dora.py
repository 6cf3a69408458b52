"""DoRA's own options: the detached norm, its cache, PEFT's dropout, stale weights."""

import pytest
import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.ops import row_norm as ops_row_norm
from decomp_kernels.testing import relative_error


def make(dtype=torch.float64, **options):
    layer = dk.DecomposedLinear(nn.Linear(12, 9, dtype=dtype), dk.DoRA(r=3, alpha=6, **options))
    with torch.no_grad():
        for tensor in layer.adapters.parameters():
            tensor.add_(0.3 * torch.randn_like(tensor))
    return layer


def formula(layer, x, detach):
    a = layer.adapters["default"]
    V = layer.weight + 2.0 * a.up @ a.down
    norm = V.norm(dim=1)
    c = a.magnitude / (norm.detach() if detach else norm)
    return x @ (c[:, None] * V).T + layer.bias


@pytest.mark.parametrize("norm_grad", [False, True])
def test_the_norm_is_a_constant_unless_asked_otherwise(norm_grad):
    layer, x = make(norm_grad=norm_grad), torch.randn(5, 12, dtype=torch.float64)
    parameters = list(layer.adapters.parameters())
    ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    right = torch.autograd.grad(formula(layer, x, not norm_grad).square().sum(), parameters)
    wrong = torch.autograd.grad(formula(layer, x, norm_grad).square().sum(), parameters)
    for mine, theirs in zip(ours, right, strict=True):
        assert relative_error(mine, theirs) < 1e-12
    assert any(relative_error(a, b) > 1e-3 for a, b in zip(ours, wrong, strict=True))


def test_a_kept_norm_lasts_until_the_next_step(monkeypatch):
    layer, x = make(cache_norm=True), torch.randn(5, 12, dtype=torch.float64)
    counted = []
    once = ops_row_norm._forward
    monkeypatch.setattr(ops_row_norm, "_forward", lambda *a: counted.append(1) or once(*a))
    optimizer = torch.optim.SGD(layer.adapters.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).sum().backward()
    assert len(counted) == 1
    optimizer.step()
    assert relative_error(layer(x), formula(layer, x, True)) < 1e-12
    assert len(counted) == 2
    with torch.no_grad():
        layer.adapters["default"].up.mul_(1.5)  # an optimizer that torch does not know of
    assert relative_error(layer(x), formula(layer, x, True)) < 1e-12
    layer.adapters["default"].down.data = layer.adapters["default"].down.data * 2
    assert relative_error(layer(x), formula(layer, x, True)) < 1e-12
    assert len(counted) == 4


@pytest.mark.parametrize("how", ["load", "in place", "data", "dtype"])
def test_a_changed_base_weight_is_seen(how):
    layer, x = make(), torch.randn(5, 12, dtype=torch.float64)
    layer(x)
    other = torch.randn(9, 12, dtype=torch.float64)
    if how == "load":
        layer.load_state_dict({**layer.state_dict(), "weight": other})
    elif how == "in place":
        with torch.no_grad():
            layer.weight.copy_(other)
    elif how == "data":
        layer.weight.data = other
    else:
        layer = layer.float().double()
    assert relative_error(layer(x), formula(layer, x, True)) < 1e-12


def test_a_loaded_base_weight_is_seen_by_compiled_code():
    layer, x = make(), torch.randn(5, 12, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(9, 12).double()})
    assert relative_error(compiled(x), formula(layer, x, True)) < 1e-12


def test_peft_dropout_mode_is_pefts_function():
    """PEFT: base + (c - 1) x~ W^T + c s x~ A^T B^T + b, with x~ dropped in both products."""
    from decomp_kernels.reference.dropout import keep_mask, kept_fraction

    layer = make(dropout=0.4, dropout_mode="peft").train()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    dropped = x * keep_mask(seed, (5, 12), 0.4) / kept_fraction(0.4)
    a = layer.adapters["default"]
    norm = (layer.weight + 2.0 * a.up @ a.down).norm(dim=1).detach()
    c = a.magnitude / norm
    low_rank = 2.0 * dropped @ a.down.T @ a.up.T
    expected = x @ layer.weight.T + (c - 1) * (dropped @ layer.weight.T) + c * low_rank + layer.bias
    leaves = [x, *layer.adapters.parameters()]
    assert relative_error(y, expected) < 1e-12
    ours = torch.autograd.grad(y.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for mine, right in zip(ours, theirs, strict=True):
        assert relative_error(mine, right) < 1e-11
    branch = make(dropout=0.4).train()
    branch.load_state_dict(layer.state_dict())
    torch.manual_seed(7)
    assert relative_error(branch(x), expected) > 1e-3


def test_matched_norms_start_at_one_with_magnitudes_from_bf16():
    linear = nn.Linear(64, 48).bfloat16()
    layer = dk.DecomposedLinear(linear, dk.DoRA(r=4, norm_dtype="match"), dtype=torch.bfloat16)
    gain = layer.adapters["default"].method.lower(layer.adapters["default"], layer.base()).out_scale
    assert torch.equal(gain, torch.ones(48))


def test_agrees_with_peft():
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(12, 9, dtype=torch.float64))
    config = LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(nn.Linear(12, 9, dtype=torch.float64)), config).double()
    module = theirs.base_model.model[0]
    module.base_layer.load_state_dict(base[0].state_dict())
    ours = dk.DecomposedLinear(base[0], dk.DoRA(r=3, lora_alpha=6))
    a = ours.adapters["default"]
    with torch.no_grad():
        for mine, peft in (
            (a.down, module.lora_A["default"].weight),
            (a.up, module.lora_B["default"].weight),
            (a.magnitude, module.lora_magnitude_vector["default"].weight),
        ):
            mine.copy_(torch.rand_like(mine) + 0.1)
            peft.copy_(mine)
    x = torch.randn(5, 12, dtype=torch.float64)
    y, expected = ours(x), theirs(x)
    assert relative_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, (a.down, a.up, a.magnitude), dy)
    right = torch.autograd.grad(
        expected,
        [module.lora_A["default"].weight, module.lora_B["default"].weight,
         module.lora_magnitude_vector["default"].weight],
        dy,
    )  # fmt: skip
    for grad, peft in zip(mine, right, strict=True):
        assert relative_error(grad, peft) < 1e-10


def test_options_are_checked():
    with pytest.raises(ValueError, match="dropout_mode must be one of branch, peft, got 'both'"):
        dk.DoRA(dropout_mode="both")
    with pytest.raises(ValueError, match="cannot be used with norm_grad=True"):
        dk.DoRA(cache_norm=True, norm_grad=True)


def test_a_norm_kept_in_inference_mode_is_good_for_training():
    layer, x = make(cache_norm=True), torch.randn(5, 12, dtype=torch.float64)
    with torch.inference_mode():
        layer(x)  # as a validation before the first step
    layer(x).sum().backward()
    assert layer.adapters["default"].up.grad is not None
