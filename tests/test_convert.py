"""Adapters as plain LoRA, and ``decomp-kernels convert`` between the formats."""

import pytest
import torch
from peft_folders import TARGETS, M, Net, inputs, moved

import decomp_kernels as dk
from decomp_kernels.interop.lowrank import as_lora
from decomp_kernels.linear import adapted_layers
from decomp_kernels.testing import relative_error

# Rank of the exact LoRA, of adapters with r = 4 (and n = 3, or as it says).
EXACT = {
    "lora": (M["lora"](r=4, alpha=6), 4),
    "rslora": (M["lora"](r=4, alpha=6, use_rslora=True), 4),
    "lora_bias": (M["lora"](r=4, lora_bias=True), 4),
    "pissa": (M["pissa"](r=4, alpha=6), 8),
    "milora": (M["milora"](r=4), 8),
    "lora_dash": (M["lora_dash"](r=4, n_directions=3), 7),
    "spectral_additive": (M["spectral_additive"](r=4), 8),
    "spectral_rotational": (M["spectral_rotational"](r=4), 4),
    "trilora": (M["trilora"](r=4, alpha=6), 4),
    "flora": (M["flora"](r=4, alpha=6), 4),
    "moslora": (M["moslora"](r=4, alpha=6), 4),
    "adalora": (M["adalora"](r=4, target_r=2, alpha=6), 4),
    "vera": (M["vera"](r=6), 6),
    "hra": (M["hra"](r=4), 4),
    "loha": (M["loha"](r=2), 4),
}
NOT_EXACT = {
    "dora": "scales",
    "ssb": "scales",
    "ia3": "scales",
    "ssl": "scales",
    "oft": "whole weight",
    "boft": "whole weight",
    "hira": "whole weight",
    "liera": "whole weight",
    "sparse": "whole weight",
    "lokr": "no single call",
    "bitfit": "changes the bias",
}


def adapted(method, dtype=torch.float64):
    return moved(dk.adapt(Net(dtype), method, TARGETS))


@pytest.mark.parametrize("name", EXACT)
def test_a_low_rank_update_is_exactly_a_lora(name):
    method, rank = EXACT[name]
    model, x = adapted(method), inputs()
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3
    report = as_lora(model)
    assert relative_error(model(x), y) < 1e-12
    assert {path: layer.rank for path, layer in report.items()} == dict.fromkeys(TARGETS, rank)
    assert report.error == 0.0
    for path, layer in adapted_layers(model).items():
        adapter = layer.adapters["default"]
        assert type(adapter.method) is M["lora"]
        assert report[path].update > 0.1
    model(x).sum().backward()  # and it trains
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NOT_EXACT)
def test_another_update_is_refused_with_the_reason(name):
    model, x = adapted(M[name].small()), inputs()
    y = model(x)
    with pytest.raises(ValueError, match=NOT_EXACT[name]):
        as_lora(model)
    assert torch.equal(model(x), y)
