"""accelerate: PEFT's outputs and gradients, on the operator, for every method."""

import copy
import dataclasses

import pytest
import torch
from peft_models import CONFIGS, OneLayer, calls, outcome, peft_model, with_our_masks
from torch import nn
from transformers.pytorch_utils import Conv1D

import decomp_kernels as dk
from decomp_kernels.interop.peft import layers
from decomp_kernels.methods.dora import DoRA
from decomp_kernels.testing import assert_as_good_as, relative_error

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


# (method, dtype): what its layer counts in training instead of FUSED, because PEFT is more exact.
PEFTS_OWN = {
    (name, "bf16"): "gradients of torch.float32 through a product in torch.bfloat16"
    for name in ("loha-9", "hira")
}


def agree(stock, x, dtype, *, training=True, path="fused"):
    """The accelerated copy against ``stock``, and both against float64."""
    stock.train(training)
    fast = dk.accelerate(copy.deepcopy(stock))
    with stock.disable_adapter():
        base = stock(x)
    with_our_masks(stock)
    exact = copy.deepcopy(stock).double()
    dy = torch.randn(*base.shape, dtype=dtype)
    got, eager = outcome(fast, x, dy), outcome(stock, x, dy)
    truth = outcome(exact, x.double(), dy.double())
    assert all(ran == {path: 1} for ran in calls(fast)), dk.report(fast)
    assert relative_error(got["y"], base) > 0.02  # the adapters do something
    assert got.keys() == eager.keys() == truth.keys()
    for name in got:
        assert got[name].dtype == eager[name].dtype, name
        assert truth[name].abs().max() > 0, name
        if dtype == torch.float64:
            assert relative_error(got[name], eager[name]) < 1e-12, name
            continue
        coarse = None
        if dtype == torch.bfloat16:
            if name.endswith("ranknum.default"):
                continue  # one number, what is left of thousands that cancel; fp32 checks it
            # The error of a few elements is a matter of luck; DoRA's magnitude meets bf16 results,
            # as it does in PEFT without dropout.
            if got[name].numel() < 16 or "magnitude" in name:
                coarse = dtype
        assert_as_good_as(got[name], eager[name], truth[name], name, coarse)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_computes_what_peft_does(name, dtype, training):
    """bf16: PEFT keeps the adapters in float32."""
    path = PEFTS_OWN.get((name, dtype), "fused")
    dtype = DTYPES[dtype]
    two = peft_model(name, dtype)
    trained = [(key, p) for key, p in two.named_parameters() if p.requires_grad]
    adapters = {p.dtype for key, p in trained if "base_layer" not in key}
    assert adapters == {torch.promote_types(dtype, torch.float32)}
    x = torch.randn(3, 40, 24, dtype=dtype)
    for model in (two, peft_model(name, dtype, OneLayer(), ["first"])):
        agree(model, x, dtype, training=training, path=path)


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_what_is_pefts_in_training_is_fused_without_gradients(name):
    name, _ = name
    model = peft_model(name, torch.bfloat16).eval()
    x = torch.randn(3, 40, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        eager, truth = model(x), copy.deepcopy(model).double()(x.double())
        dk.accelerate(model)
        assert_as_good_as(model(x), eager, truth, "y")
    assert calls(model) == [{"fused": 1}] * 2


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "adalora", "vera", "hira"])
def test_gpt2s_linear(name):
    model = nn.Sequential()
    model.first, model.second = Conv1D(20, 24), Conv1D(16, 20)
    model = peft_model(name, torch.float64, model)
    agree(model, torch.randn(3, 40, 24, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_under_autocast_results_have_pefts_dtype(name):
    stock = peft_model(name)
    fast = dk.accelerate(copy.deepcopy(stock))
    with_our_masks(stock)
    x, dy = torch.randn(5, 24), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = outcome(fast, x, dy), outcome(stock, x, dy)
    exact = copy.deepcopy(stock).double()
    truth = outcome(exact, x.double(), dy.double())
    assert calls(fast) == [{"fused": 1}] * 2
    for key in got:
        assert got[key].dtype == eager[key].dtype
        assert_as_good_as(got[key], eager[key], truth[key], key, torch.bfloat16)


def dropped_scale(monkeypatch):
    monkeypatch.setattr(layers, "scale_of", lambda scale: 1.0)


def other_dropout(monkeypatch):
    form = dataclasses.replace(DoRA.peft_form, ours={"dropout_mode": "branch"})
    monkeypatch.setattr(DoRA, "peft_form", form)


def bias_outside(monkeypatch):
    right = layers.live
    monkeypatch.setattr(layers, "live", lambda method, **_: right(method))


def fixed_ranknum(monkeypatch):
    monkeypatch.setattr(layers.AdaLora, "_run", layers.Accelerated._run)


BUGS = {
    "lora": dropped_scale,
    "dora-dropout": other_dropout,
    "ia3": bias_outside,
    "adalora": fixed_ranknum,
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_seen(name, monkeypatch):
    x = torch.randn(3, 40, 24, dtype=torch.float64)
    agree(peft_model(name, torch.float64), x, torch.float64)
    BUGS[name](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        agree(peft_model(name, torch.float64), x, torch.float64)
