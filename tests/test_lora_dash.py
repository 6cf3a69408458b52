"""LoRA-Dash: which directions are selected, when, and that nothing about it is forgotten."""

import pytest
import torch
from torch import nn

from decomp_kernels import DecomposedLinear, adapt, merge, methods
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.methods.lora_dash import LoRADash, select_directions
from decomp_kernels.testing import relative_error

METHOD = LoRADash(r=3, alpha=6.0, n_directions=4)  # scale 2


def made(dtype=torch.float64, N=12, K=20):
    adapter, base = Adapter(METHOD), Base(torch.randn(N, K, dtype=dtype), None, dtype, "q")
    METHOD.create(adapter, base)
    return adapter, base


def warm_up(adapter):
    with torch.no_grad():
        adapter.up.normal_()


def test_the_directions_are_those_that_the_branch_changes_most():
    adapter, base = made()
    warm_up(adapter)
    METHOD.select_directions(adapter, base)
    U, S, Vt = torch.linalg.svd(base.weight, full_matrices=False)
    change = torch.diag(U.T @ (2.0 * adapter.up @ adapter.down) @ Vt.T).detach()
    ratio = (change / S).abs()
    chosen = ratio.argsort(descending=True)[:4]
    assert set(chosen.tolist()) != set(change.abs().argsort(descending=True)[:4].tolist())
    expected = U[:, chosen] @ torch.diag(torch.arange(1.0, 5.0).double()) @ Vt[chosen]
    d = torch.diag(torch.arange(1.0, 5.0).double())
    assert relative_error(adapter.direction_up @ d @ adapter.direction_down, expected) < 1e-12
    assert adapter.selected


def test_before_the_selection_it_is_lora_and_the_scales_of_directions_do_not_move():
    adapter, base = made()
    warm_up(adapter)
    lora = methods()["lora"](r=3, alpha=6.0)
    twin = Adapter(lora)
    twin.down, twin.up = adapter.down, adapter.up
    x = torch.randn(5, 20, dtype=torch.float64)
    y = METHOD.forward(adapter, base, x, training=True)
    assert relative_error(y, lora.forward(twin, base, x, training=True)) < 1e-15
    y.square().sum().backward()
    assert torch.equal(adapter.core.grad, torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.1)
    optimizer.step()
    assert not adapter.core.any()


def test_after_the_selection_the_same_optimizer_trains_the_scales():
    adapter, base = made()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)  # built before any forward
    warm_up(adapter)
    METHOD.select_directions(adapter, base)
    x = torch.randn(5, 20, dtype=torch.float64)
    METHOD.forward(adapter, base, x, training=True).square().sum().backward()
    optimizer.step()
    assert (adapter.core != 0).all()
    assert not adapter.direction_up.requires_grad


def test_the_selection_survives_saving_and_changes_no_shape():
    adapter, base = made()
    before = {name: (t.shape, t.dtype) for name, t in adapter.state_dict().items()}
    warm_up(adapter)
    METHOD.select_directions(adapter, base)
    with torch.no_grad():
        adapter.core.normal_()
    assert {name: (t.shape, t.dtype) for name, t in adapter.state_dict().items()} == before
    fresh, _ = made()
    fresh.load_state_dict(adapter.state_dict())
    x = torch.randn(5, 20, dtype=torch.float64)
    expected = METHOD.forward(adapter, base, x, training=False)
    assert torch.equal(METHOD.forward(fresh, base, x, training=False), expected)
    with pytest.raises(ValueError, match="the directions of q are selected already"):
        METHOD.select_directions(fresh, base)


def test_an_untrained_branch_selects_nothing():
    adapter, base = made()
    with pytest.raises(ValueError, match="the branch of q changes nothing yet"):
        METHOD.select_directions(adapter, base)
    assert not adapter.selected
    assert not adapter.direction_up.any()


def test_directions_that_neither_exist_nor_change_are_not_selected():
    """A weight with exact zeros among its singular values: 0 / 0 must not come first."""
    adapter, base = made()
    warm_up(adapter)
    with torch.no_grad():
        base.weight.zero_()
        base.weight[:4, :4] = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        adapter.up[4:] = 0
    assert (torch.linalg.svdvals(base.weight)[4:] == 0).all()
    METHOD.select_directions(adapter, base)
    assert not adapter.direction_up[4:].any()
    assert relative_error(adapter.direction_up.abs().sum(1)[:4], torch.ones(4)) < 1e-12


def test_a_whole_model_at_once_or_not_at_all():
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 9))
    with pytest.raises(ValueError, match="the model has no active LoRADash adapter"):
        select_directions(model)
    adapt(model, METHOD, target_modules=["0", "2"])
    first, second = (model[i].adapters["default"] for i in (0, 2))
    warm_up(first)
    with pytest.raises(ValueError, match="the branch of 2 changes nothing yet"):
        select_directions(model)
    assert not first.selected
    warm_up(second)
    select_directions(model)
    for i, adapter in ((0, first), (2, second)):
        twin, base = Adapter(METHOD), Base(model[i].weight, None, torch.float32)
        METHOD.create(twin, base)
        twin.load_state_dict({**adapter.state_dict(), "selected": torch.tensor(False)}, strict=True)
        METHOD.select_directions(twin, base)
        assert torch.equal(twin.direction_up, adapter.direction_up)
        assert torch.equal(twin.direction_down, adapter.direction_down)
    with pytest.raises(ValueError, match="selected already"):
        select_directions(model)
    merge(model)
    with pytest.raises(RuntimeError, match="0 is merged; call unmerge"):
        select_directions(model)


def test_forward_calls_are_not_counted():
    """Gradient accumulation and activation checkpointing call forward more often than steps."""
    layer = DecomposedLinear(nn.Linear(20, 12), METHOD)
    warm_up(layer.adapters["default"])
    x = torch.randn(5, 20)
    expected = layer(x)
    for _ in range(150):  # the paper's warm-up is 100 steps
        assert torch.equal(layer(x), expected)


def test_too_many_directions_for_the_layer():
    with pytest.raises(ValueError, match=r"n_directions must be at most .* = 12 for q, got 13"):
        LoRADash(n_directions=13).check_shape(12, 20, "q")
    LoRADash(n_directions=12).check_shape(12, 20, "q")
    LoRADash(r=40).check_shape(12, 20, "q")  # A and B may be as wide as they like
    with pytest.raises(ValueError, match="n_directions must be at least 1"):
        LoRADash(n_directions=0)
