"""accelerate: PEFT's outputs and gradients, on the operator, for every method."""

import copy

import pytest
import torch
from peft_models import CONFIGS, calls, outcome, peft_model, with_our_masks

import decomp_kernels as dk
from decomp_kernels.testing import assert_as_good_as, relative_error

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def agree(stock, x, dtype, training=True):
    """The accelerated copy against ``stock``, and both against float64."""
    stock.train(training)
    with_adapter_off = copy.deepcopy(stock)
    with with_adapter_off.disable_adapter():
        base = with_adapter_off(x)
    fast = dk.accelerate(copy.deepcopy(stock))
    with_our_masks(stock)
    exact = copy.deepcopy(stock).double()
    dy = torch.randn(*base.shape, dtype=dtype)
    got, eager = outcome(fast, x, dy), outcome(stock, x, dy)
    truth = outcome(exact, x.double(), dy.double())
    assert all(ran == {"fused": 1} for ran in calls(fast)), dk.report(fast)
    assert relative_error(got["y"], base) > 0.02  # the adapters do something
    assert got.keys() == eager.keys() == truth.keys()
    for name in got:
        assert got[name].dtype == eager[name].dtype, name
        assert truth[name].abs().max() > 0, name
        if dtype == torch.float64:
            assert relative_error(got[name], eager[name]) < 1e-12, name
        else:
            if name.endswith("ranknum.default") and dtype == torch.bfloat16:
                continue  # one number, what is left of thousands that cancel; fp32 checks it
            # The error of a few elements is a matter of luck: bf16 results were summed in them.
            few = dtype if got[name].numel() < 16 else None
            assert_as_good_as(got[name], eager[name], truth[name], name, few)
    return fast


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_computes_what_peft_does(name, dtype, training):
    """bf16: PEFT keeps the adapters in float32."""
    dtype = DTYPES[dtype]
    model = peft_model(name, dtype)
    adapters = {p.dtype for p in model.parameters() if p.requires_grad}
    assert adapters == {torch.promote_types(dtype, torch.float32)}
    agree(model, torch.randn(3, 40, 24, dtype=dtype), dtype, training)
