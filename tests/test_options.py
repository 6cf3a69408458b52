"""set_options: what may change on adapters that are made, and what then has it."""

import copy

import pytest
import torch
from tiny_models import adapted, two_linears

import decomp_kernels as dk
from decomp_kernels.testing import relative_error


def methods_of(model):
    return [layer.adapters["default"].method for layer in (model[0], model[2])]


def test_forward_merge_report_and_files_have_the_new_alpha(tmp_path):
    base = two_linears().double()
    model = adapted(copy.deepcopy(base), dk.LoRA(r=4, alpha=8))
    x = torch.randn(3, 24, dtype=torch.float64)
    assert dk.set_options(model, alpha=2.0, dropout=0.5) is model
    layer, A = model[0], model[0].adapters["default"]
    expected = base[0](x) + 0.5 * x @ A.down.T @ A.up.T
    assert relative_error(layer.eval()(x), expected) < 1e-12
    assert "alpha=2.0, dropout=0.5" in dk.report(model)
    y = model.eval()(x)
    dk.save_adapter(model, tmp_path / "a")
    assert torch.equal(dk.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()(x), y)
    assert relative_error(dk.merge(model)(x), y) < 1e-12


@pytest.mark.parametrize("cache_norm", [False, True])
def test_doras_norm_has_the_new_scale(cache_norm):
    model = adapted(two_linears().double(), dk.DoRA(r=4, cache_norm=cache_norm))
    x = torch.randn(3, 24, dtype=torch.float64)
    before = model(x)
    dk.set_options(model, alpha=2.0)
    assert relative_error(model(x), before) > 1e-2
    for layer in (model[0], model[2]):
        adapter = layer.adapters["default"]
        exact = (layer.weight + 0.5 * adapter.up @ adapter.down).norm(dim=1)
        assert relative_error(adapter.method.norm(adapter, layer.base()), exact) < 1e-12


def test_one_adapter_of_two():
    model = adapted(two_linears(), dk.LoRA(r=4))
    dk.adapt(model, dk.LoRA(r=2), ["0"], adapter_name="other")
    dk.set_options(model, adapter_name="other", alpha=3.0)
    assert model[0].adapters["other"].method.alpha == 3.0
    assert {method.alpha for method in methods_of(model)} == {8.0}


@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (TypeError, {}, "give an option to change, one of alpha, scale, dropout, impl"),
        (TypeError, {"r": 8}, "'r' cannot be changed on an adapter that is made"),
        (TypeError, {"alpha": "2"}, r"LoRA\(alpha=...\) must be float, got '2'"),
        (ValueError, {"alpha": float("nan")}, "must be finite"),
        (ValueError, {"alpha": 2.0, "dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (ValueError, {"scale": 2.0}, "no active adapter has scale"),
        (ValueError, {"alpha": 2.0, "adapter_name": "b"}, "no adapter 'b' has alpha"),
    ],
)
def test_refuses_and_changes_nothing(error, options, says):
    model = adapted(two_linears(), dk.LoRA(r=4))
    before = methods_of(model)
    with pytest.raises(error, match=says):
        dk.set_options(model, **options)
    assert methods_of(model) == before


def test_refuses_while_merged():
    model = dk.merge(adapted(two_linears(), dk.LoRA(r=4)))
    with pytest.raises(RuntimeError, match="0 has adapter 'default' merged; call unmerge"):
        dk.set_options(model, alpha=2.0)
    assert methods_of(model) == [dk.LoRA(r=4)] * 2
