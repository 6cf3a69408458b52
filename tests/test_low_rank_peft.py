"""The low-rank methods over a model, against PEFT's layers, and VeRA's shared projections."""

import pytest
import torch
from low_rank import M, double_copy
from torch import nn

from decomp_kernels import adapt
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.methods.vera import VeRA
from decomp_kernels.testing import assert_as_good_as, relative_error


def two_layers():
    return nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 30))


def test_vera_has_one_pair_of_projections_for_the_whole_model():
    model = adapt(two_layers(), VeRA(r=6, projection_prng_key=3))
    first, second = (model[i].adapters["default"] for i in (0, 2))
    assert first.shared_down is second.shared_down
    assert first.shared_up is second.shared_up
    assert first.shared_down.shape == (6, 20)
    assert first.shared_up.shape == (30, 6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 + 30 + 2 * 6
    model.to(torch.bfloat16)
    assert first.shared_down is second.shared_down
    assert first.shared_down.dtype == torch.bfloat16


def test_vera_projections_follow_the_key_and_not_the_global_generator():
    def projections(key):
        return VeRA(r=6, projection_prng_key=key).share(
            [(4, 9), (8, 5)], torch.float32, torch.device("cpu")
        )

    before = torch.get_rng_state()
    one, again, other = projections(1), projections(1), projections(2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, shape in (("shared_down", (6, 9)), ("shared_up", (8, 6))):
        assert one[name].shape == shape
        assert not one[name].requires_grad
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


def peft_model(config, **options):
    import peft

    model = two_layers()
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped = peft.get_peft_model(
        model, getattr(peft, config)(target_modules=["0", "2"], **options)
    )
    ours = two_layers()
    ours.load_state_dict(plain)
    return wrapped, ours


def agree(wrapped, ours, pairs):
    """Same values in, same outputs and gradients out, in float64.  pairs: (theirs, ours)."""
    wrapped.double(), ours.double()
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.add_(0.3 * torch.randn_like(theirs))
            mine.copy_(theirs.view_as(mine))
    x = torch.randn(5, 20, dtype=torch.float64)
    expected, y = wrapped(x), ours(x)
    assert relative_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    right = torch.autograd.grad(expected, [theirs for theirs, _ in pairs], dy)
    got = torch.autograd.grad(y, [mine for _, mine in pairs], dy)
    for mine, theirs in zip(got, right, strict=True):
        assert theirs.abs().max() > 1e-6
        assert relative_error(mine, theirs.view_as(mine)) < 1e-12


def layers(wrapped, ours):
    for i in (0, 2):
        yield wrapped.base_model.model[i], ours[i].adapters["default"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_is_pefts(use_rslora):
    options = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora}
    wrapped, ours = peft_model("LoraConfig", **options)
    adapt(ours, M["lora"](**options))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        pairs += [
            (theirs.lora_A["default"].weight, mine.down),
            (theirs.lora_B["default"].weight, mine.up),
        ]
    agree(wrapped, ours, pairs)


def test_adalora_is_pefts():
    wrapped, ours = peft_model("AdaLoraConfig", init_r=4, target_r=2, lora_alpha=6, total_step=9)
    adapt(ours, M["adalora"](init_r=4, target_r=2, lora_alpha=6))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        pairs += [
            (theirs.lora_A["default"], mine.down),
            (theirs.lora_B["default"], mine.up),
            (theirs.lora_E["default"], mine.core),
        ]
    agree(wrapped, ours, pairs)


def test_vera_is_pefts_with_the_same_projections():
    options = {"r": 6, "projection_prng_key": 3, "d_initial": 0.2}
    wrapped, ours = peft_model("VeraConfig", **options)
    adapt(ours, VeRA(**options))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        assert torch.equal(mine.shared_down, theirs.vera_A["default"])
        assert torch.equal(mine.shared_up, theirs.vera_B["default"])
        assert torch.equal(mine.core, theirs.vera_lambda_d["default"])
        pairs += [
            (theirs.vera_lambda_d["default"], mine.core),
            (theirs.vera_lambda_b["default"], mine.up_scale),
        ]
    agree(wrapped, ours, pairs)


def test_pissa_starts_with_pefts_factors_and_computes_its_function():
    wrapped, ours = peft_model("LoraConfig", r=4, lora_alpha=6, init_lora_weights="pissa")
    originals = [ours[i].weight.detach().clone() for i in (0, 2)]
    adapt(ours, M["pissa"](r=4, alpha=6))
    for (theirs, mine), weight in zip(layers(wrapped, ours), originals, strict=True):
        A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
        U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
        root = (S[:4] / 1.5).sqrt()
        sign = (A * mine.down.detach()).sum(1).sign()  # singular vectors are unique up to it
        expected = (root[:, None] * Vt[:4]) * (A.double() * Vt[:4]).sum(1).sign()[:, None]
        assert_as_good_as(sign[:, None] * mine.down, A, expected, "A")
        expected = U[:, :4] * root * (B.double() * U[:, :4]).sum(0).sign()
        assert_as_good_as(mine.up * sign, B, expected, "B")
        with torch.no_grad():  # the same step away from each start
            step = 0.3 * torch.randn_like(A)
            theirs.lora_A["default"].weight.add_(step)
            mine.down.add_(sign[:, None] * step)
    x = torch.randn(5, 20)
    reference = two_layers().double()
    with torch.no_grad():
        for i, (_, mine), weight in zip((0, 2), layers(wrapped, ours), originals, strict=True):
            a = double_copy(mine)
            reference[i].bias.copy_(ours[i].bias)
            change = 1.5 * (a["up"] @ a["down"] - a["up0"] @ a["down0"])
            reference[i].weight.copy_(weight.double() + change)
    assert_as_good_as(ours(x), wrapped(x), reference(x.double()), "y")
    for i, weight in zip((0, 2), originals, strict=True):
        assert torch.equal(ours[i].weight, weight)  # PEFT's is the residual by now


def test_pissas_fast_decomposition_is_no_worse_than_pefts():
    import peft

    spectrum = torch.diag(0.8 ** torch.arange(24.0))
    left, right = (torch.linalg.qr(torch.randn(n, 24)).Q for n in (30, 40))
    weight = left @ spectrum @ right.T
    model = nn.Sequential(nn.Linear(40, 30))
    model[0].weight.data.copy_(weight)
    method = M["pissa"](r=4, alpha=4.0, niter=4)
    adapter = Adapter(method)
    method.create(adapter, Base(weight, None, torch.float32))
    config = peft.LoraConfig(
        target_modules=["0"], r=4, lora_alpha=4, init_lora_weights="pissa_niter_4"
    )
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    U, S, Vt = torch.linalg.svd(weight.double())
    exact = U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]
    assert_as_good_as(adapter.up0 @ adapter.down0, product.detach(), exact, "B0 A0")
