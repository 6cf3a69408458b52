"""LieRA to LoKr against PEFT's own layers: same weights, same outputs, same gradients."""

import copy
import math

import pytest
import torch
from peft import (
    BOFTConfig,
    HiraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    ShiraConfig,
    get_peft_model,
)
from peft.tuners.boft import layer as peft_boft
from peft.tuners.lokr.layer import factorization as peft_factorization
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from decomp_kernels import DecomposedLinear, methods
from decomp_kernels.methods.lokr import factorization
from decomp_kernels.methods.oft import nearest_divisor
from decomp_kernels.testing import assert_as_good_as, relative_error

M = methods()
N, K = 20, 24


def pair(config, method, dtype, shape=(N, K)):
    """(our layer, PEFT's layer) on equal base weights, ours moved away from the start."""
    N, K = shape
    torch.manual_seed(0)
    base = nn.Linear(K, N, dtype=dtype)
    ours = DecomposedLinear(nn.Linear(K, N, dtype=dtype), method).eval()
    ours.load_state_dict(base.state_dict(), strict=False)
    config.target_modules = ["layer"]
    model = nn.Sequential()
    model.add_module("layer", base)
    theirs = get_peft_model(model, config).base_model.model.layer.to(dtype).eval()
    adapter = ours.adapters["default"]
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.2 * torch.randn_like(p)
    return ours, theirs


def trained(layer):
    """PEFT's parameters, without the adapter's name."""
    named = layer.named_parameters()
    return {n.replace(".default", ""): p for n, p in named if p.requires_grad}


def agree(ours, theirs, names, K=K):
    """float64: equal.  float32: no further from PEFT in float64 than twice PEFT in float32 is.

    names: our tensor -> PEFT's, or (PEFT's, how ours reads in PEFT's shape).
    """
    adapter = ours.adapters["default"]
    names = {n: to if isinstance(to, tuple) else (to, lambda t: t) for n, to in names.items()}
    assert set(names) == set(dict(adapter.named_parameters()))
    assert {peft_name for peft_name, _ in names.values()} == set(trained(theirs))
    with torch.no_grad():
        for name, (peft_name, read) in names.items():
            trained(theirs)[peft_name].copy_(read(getattr(adapter, name)))
    exact = copy.deepcopy(theirs).double()
    for tokens in (7, 60):
        x = torch.randn(tokens, K, dtype=ours.weight.dtype, requires_grad=True)
        dy = torch.randn(tokens, ours.out_features, dtype=x.dtype)
        plain = outcome(theirs, x, dy, names)
        truth = outcome(exact, x.detach().double().requires_grad_(), dy.double(), names)
        base = nn.functional.linear(x, ours.weight, ours.bias)
        assert relative_error(plain["y"], base) > 0.05
        y = ours(x)
        grads = torch.autograd.grad(y, [x, *(getattr(adapter, n) for n in names)], dy)
        read = {name: to[1] for name, to in names.items()} | {"x": lambda t: t}
        found = {n: read[n](g) for n, g in zip(("x", *names), grads, strict=True)}
        for name, value in {"y": y, **found}.items():
            agrees(value, plain[name], truth[name], name)
    for layer in (theirs, exact):
        layer.merge()
    merged = [layer.get_base_layer().weight for layer in (theirs, exact)]
    agrees(ours.merged_values()[0], *merged, "merged")


def outcome(layer, x, dy, names):
    y = layer(x)
    parameters = trained(layer)
    leaves = [x, *(parameters[peft_name] for peft_name, _ in names.values())]
    grads = torch.autograd.grad(y, leaves, dy)
    return {"y": y, **dict(zip(("x", *names), grads, strict=True))}


def agrees(value, plain, truth, name):
    if value.dtype == torch.float64:
        assert relative_error(value, plain) < 1e-12, name
    else:
        assert_as_good_as(value, plain, truth, name)


both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@both
def test_hira(dtype):
    ours, theirs = pair(HiraConfig(r=4), M["hira"](r=4), dtype)
    agree(ours, theirs, {"down": "hira_A", "up": "hira_B"})


@both
def test_liera_is_hira_with_the_scale_in_one_factor(dtype):
    ours, theirs = pair(HiraConfig(r=4), M["liera"](r=4, alpha=4.0), dtype)
    agree(ours, theirs, {"down": "hira_A", "up": "hira_B"})
    ours, theirs = pair(HiraConfig(r=4), M["liera"](r=4, alpha=8.0), dtype)
    adapter = ours.adapters["default"]
    with torch.no_grad():
        theirs.hira_A["default"].copy_(adapter.down)
        theirs.hira_B["default"].copy_(2 * adapter.up)
    x = torch.randn(5, K, dtype=dtype)
    agrees(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()), "y")


@both
@pytest.mark.parametrize("r", [3, 9], ids=["branch", "weight"])
def test_loha(r, dtype):
    alpha = r / 2  # PEFT holds alpha / r in float32
    ours, theirs = pair(LoHaConfig(r=r, alpha=alpha), M["loha"](r=r, alpha=alpha), dtype)
    names = {"up1": "hada_w1_a", "down1": "hada_w1_b", "up2": "hada_w2_a", "down2": "hada_w2_b"}
    agree(ours, theirs, names)


OFT_OPTIONS = {
    "default": {"oft_block_size": 6},
    "r": {"r": 3, "oft_block_size": 0},
    "exact": {"oft_block_size": 6, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 4, "block_share": True},
    "shared-exact": {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False},
    "2-terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 2},
    "3-terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 3},
    "4-terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 4},
    "8-terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 8},
    "coft": {"oft_block_size": 6, "coft": True, "eps": 0.5},
}


@both
@pytest.mark.parametrize("options", OFT_OPTIONS)
def test_oft(options, dtype):
    options = {"use_cayley_neumann": True, **OFT_OPTIONS[options]}
    mine = {k: v for k, v in options.items() if (k, v) != ("oft_block_size", 0)}
    ours, theirs = pair(OFTConfig(**options), M["oft"](**mine), dtype)
    agree(ours, theirs, {"rotation": "oft_R.weight"})


def test_ofts_defaults_are_pefts():
    ours, theirs = M["oft"](), OFTConfig()
    assert ours.use_cayley_neumann == theirs.use_cayley_neumann
    assert ours.num_cayley_neumann_terms == theirs.num_cayley_neumann_terms
    assert (ours.coft, ours.eps, ours.block_share) == (theirs.coft, theirs.eps, theirs.block_share)
    for K in (33, 48, 60, 90, 96, 127, 384, 768):
        assert nearest_divisor(K, 32) == OFTLayer.adjust_oft_parameters(None, K, 32), K


@both
def test_boft(dtype):
    ours, theirs = pair(BOFTConfig(boft_block_size=4), M["boft"](block_size=4), dtype)
    agree(ours, theirs, {"rotation": "boft_R", "out_scale": ("boft_s", lambda t: t[:, None])})


class BlockDiagonal:
    """What PEFT's CUDA extension computes, so that its own code runs with several factors."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@both
@pytest.mark.parametrize(
    ("size", "factors", "shape"),
    [(4, 2, (N, K)), (6, 3, (N, K)), (2, 4, (7, 32)), (8, 2, (7, 32))],
    ids=str,
)
def test_boft_with_several_factors(size, factors, shape, dtype, monkeypatch):
    """PEFT silently takes one factor where its extension is missing, so that is stood in for."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: object())
    monkeypatch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)
    config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors)
    method = M["boft"](block_size=size, n_butterfly_factor=factors)
    ours, theirs = pair(config, method, dtype, shape)
    assert theirs.boft_R["default"].shape[0] == factors
    names = {"rotation": "boft_R", "out_scale": ("boft_s", lambda t: t[:, None])}
    agree(ours, theirs, names, K=shape[1])


@both
@pytest.mark.parametrize("r", [4, 5])
@pytest.mark.parametrize("apply_GS", [False, True], ids=["reflections", "orthonormal"])
def test_hra(r, apply_GS, dtype):
    ours, theirs = pair(HRAConfig(r=r, apply_GS=apply_GS), M["hra"](r=r, apply_GS=apply_GS), dtype)
    agree(ours, theirs, {"down": ("hra_u", lambda t: t.T)})


LOKR_OPTIONS = {
    "whole": {"r": 8},
    "small-r": {"r": 2},
    "both": {"r": 1, "decompose_both": True},
    "factor": {"r": 2, "decompose_factor": 4},
}


@both
@pytest.mark.parametrize("options", LOKR_OPTIONS)
def test_lokr(options, dtype):
    options = LOKR_OPTIONS[options]
    shape = (30, 42)
    ours, theirs = pair(
        LoKrConfig(alpha=6, **options), M["lokr"](alpha=6.0, **options), dtype, shape
    )
    names = {
        "left": "lokr_w1",
        "left_up": "lokr_w1_a",
        "left_down": "lokr_w1_b",
        "right": "lokr_w2",
        "right_up": "lokr_w2_a",
        "right_down": "lokr_w2_b",
    }
    made = dict(ours.adapters["default"].named_parameters())
    agree(ours, theirs, {n: to for n, to in names.items() if n in made}, K=42)


def test_lokrs_factorization_is_pefts():
    for number in (*range(1, 130), 384, 768, 1024, 3072, 4096, 11008, 14336):
        for factor in (-1, *range(1, 20), 64, 100):
            assert factorization(number, factor) == peft_factorization(number, factor)


@both
def test_shira(dtype):
    ours, theirs = pair(ShiraConfig(r=2), M["sparse"](r=2), dtype)
    adapter = ours.adapters["default"]
    rows, cols = theirs.shira_indices["default"].long()
    assert theirs.shira_weight["default"].shape == adapter.values.shape
    values = adapter.values.detach().clone()
    adapter.method.set_mask(adapter, (N, K), rows, cols, values)
    theirs.shira_indices["default"] = torch.stack((adapter.rows, adapter.cols))
    agree(ours, theirs, {"values": "shira_weight"})


def test_starts_are_pefts():
    """The same tensors, drawn from the same ranges, and zeros where PEFT has zeros."""
    for config, method, names in [
        (HiraConfig(r=4), M["hira"](r=4), {"down": "hira_A", "up": "hira_B"}),
        (
            LoHaConfig(r=4),
            M["loha"](r=4),
            {"up1": "hada_w1_a", "down1": "hada_w1_b", "up2": "hada_w2_a", "down2": "hada_w2_b"},
        ),
        (HRAConfig(r=4), M["hra"](r=4), {"down": "hra_u"}),
        (LoKrConfig(r=16), M["lokr"](r=16), {"left": "lokr_w1", "right": "lokr_w2"}),
    ]:
        config.target_modules = ["layer"]
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(240, 200))
        layer = DecomposedLinear(nn.Linear(240, 200), method)
        theirs = get_peft_model(model, config).base_model.model.layer
        for ours, peft_name in names.items():
            a = getattr(layer.adapters["default"], ours).detach().abs().max()
            b = getattr(theirs, peft_name)["default"].detach().abs().max()
            assert math.isclose(a, b, rel_tol=0.1), (ours, a, b)
