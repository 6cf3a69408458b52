"""The low-rank methods, each against its formula written out densely in float64.

Every parameter is first moved away from the start, where most mistakes are invisible.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from low_rank import (
    ALL,
    BRANCHES,
    LINEAR,
    LOW,
    PHI,
    SERIES,
    SHAPES,
    disturb,
    double_copy,
    dropped,
    made,
    next_seed,
    trained,
)
from torch.nn import functional as F

from decomp_kernels.testing import assert_as_good_as, relative_error


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", BRANCHES)
def test_a_branch_is_its_dense_formula(case, shape, impl):
    (method, branch), (N, K) = BRANCHES[case], shape
    method = replace(method, impl=impl)
    adapter, base = made(method, N, K)
    disturb(adapter, base)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, N, dtype=torch.float64)

    seed = next_seed()
    y = method.forward(adapter, base, x, training=True)
    ours = torch.autograd.grad(y, [x, *trained(adapter).values()], dy)

    a, x64 = double_copy(adapter), x.detach().clone().requires_grad_()
    plain = F.linear(x64, base.weight, base.bias)
    exact = plain + branch(SimpleNamespace(**a), dropped(x64, seed))
    assert (exact - plain).abs().max() > 1e-2 * plain.abs().max()
    theirs = torch.autograd.grad(exact, [x64, *(a[name] for name in trained(adapter))], dy)

    assert relative_error(y, exact) < 1e-12
    for name, mine, right in zip(["x", *trained(adapter)], ours, theirs, strict=True):
        assert right.abs().max() > 1e-6, f"the gradient of {name} is nothing to compare with"
        assert relative_error(mine, right) < 1e-12, name


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", LINEAR)
def test_the_merged_linear_is_the_dense_formula(case, bias):
    method, branch = BRANCHES[case]
    adapter, base = made(method, 12, 20, bias=bias)
    disturb(adapter, base)
    weight, merged_bias = method.merged(adapter, base)
    change = branch(SimpleNamespace(**double_copy(adapter)), torch.eye(20, dtype=torch.float64)).T
    assert relative_error(weight, base.weight + change) < 1e-12
    assert (merged_bias is None) == (not bias)
    x = torch.randn(5, 20, dtype=torch.float64)
    served = method.forward(adapter, base, x, training=False)
    assert relative_error(F.linear(x, weight, merged_bias), served) < 1e-12


def test_what_cannot_be_merged_says_so():
    for method in ALL:
        curved = getattr(method, "activation", "identity") != "identity"
        assert (method.why_not_mergeable is not None) == curved


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", SERIES)
def test_the_series_adapter_is_its_dense_formula(activation, shape, impl):
    N, K = shape
    method = type(SERIES[activation])(r=4, scale=0.7, activation=activation, impl=impl)
    adapter, base = made(method, N, K)
    disturb(adapter, base)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, N, dtype=torch.float64)
    y = method.forward(adapter, base, x, training=True)
    ours = torch.autograd.grad(y, [x, *trained(adapter).values()], dy)

    a, x64 = double_copy(adapter), x.detach().clone().requires_grad_()
    z = F.linear(x64, base.weight, base.bias)
    hidden = PHI[activation](z @ a["down"].T + a["down_bias"])
    exact = z + 0.7 * hidden @ a["up"].T + a["up_bias"]
    assert (exact - z).abs().max() > 1e-2 * z.abs().max()
    theirs = torch.autograd.grad(exact, [x64, *(a[name] for name in trained(adapter))], dy)
    assert relative_error(y, exact) < 1e-12
    for name, mine, right in zip(["x", *trained(adapter)], ours, theirs, strict=True):
        assert relative_error(mine, right) < 1e-12, name


@pytest.mark.parametrize("dtypes", LOW)
@pytest.mark.parametrize("activation", SERIES)
def test_the_series_adapter_in_low_precision(activation, dtypes):
    """No worse than plain PyTorch in these dtypes, which converts z where the adapter is wider."""
    method, (dtype, adapter_dtype) = replace(SERIES[activation], r=32), LOW[dtypes]
    adapter, base = made(method, 48, 40, dtype, adapter_dtype)
    disturb(adapter, base)
    x = torch.randn(33, 40).to(dtype).requires_grad_()
    dy = torch.randn(33, 48).to(dtype)

    def plain(x, weight, bias, a):
        z = F.linear(x, weight, bias)
        t = z.to(a["down"].dtype) @ a["down"].T + a["down_bias"].to(a["down"].dtype)
        branch = 0.7 * PHI[activation](t) @ a["up"].T + a["up_bias"].to(a["up"].dtype)
        return (z + branch).to(x.dtype)

    def outcome(x, weight, bias, a):
        y = plain(x, weight, bias, a)
        return y, *torch.autograd.grad(y, [x, *(a[name] for name in trained(adapter))], dy.to(y))

    y = method.forward(adapter, base, x, training=True)
    ours = y, *torch.autograd.grad(y, [x, *trained(adapter).values()], dy)
    eager = outcome(x, base.weight, base.bias, trained(adapter))
    x64 = x.detach().double().requires_grad_()
    exact = outcome(x64, base.weight.double(), base.bias.double(), double_copy(adapter))
    for row in zip(ours, eager, exact, ["y", "x", *trained(adapter)], strict=True):
        assert_as_good_as(*row)


def test_the_series_adapter_asks_only_for_the_gradients_it_needs():
    adapter, base = made(SERIES["gelu"], 5, 6)
    disturb(adapter, base)
    x = torch.randn(3, 6, dtype=torch.float64)
    y = adapter.method.forward(adapter, base, x, training=True)
    everything = torch.autograd.grad(y.sum(), list(trained(adapter).values()))
    saved = []
    for name, expected in zip(trained(adapter), everything, strict=True):
        for other, p in adapter.named_parameters():
            p.requires_grad_(other == name)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = adapter.method.forward(adapter, base, x, training=True)
        (alone,) = torch.autograd.grad(y.sum(), [getattr(adapter, name)])
        assert torch.equal(alone, expected), name
        assert any(t.shape == y.shape for t in saved) == (name == "down"), "z is for dA alone"


def test_the_series_adapter_feeds_an_in_place_consumer():
    adapter, base = made(SERIES["relu"], 5, 6)
    disturb(adapter, base)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    y = adapter.method.forward(adapter, base, x, training=True)
    expected = torch.autograd.grad(F.relu(y).sum(), x, retain_graph=True)[0]
    y = adapter.method.forward(adapter, base, x, training=True)
    assert torch.equal(torch.autograd.grad(y.relu_().sum(), x)[0], expected)
