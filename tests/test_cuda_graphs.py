"""Adapted models recorded in CUDA graphs, forward and backward; run on a GPU by make gpu-check."""

import copy

import pytest
import torch
from tiny_models import adapted, trained, two_linears

import decomp_kernels as dk

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs are recorded on a GPU alone"
)

METHODS = {
    "lora": dk.LoRA(r=4, dropout=0.25),
    "dora": dk.DoRA(r=4, dropout=0.25),
    "dora-cached": dk.DoRA(r=4, cache_norm=True),
    "ssb": dk.SSB(),
}
IMPLS = ("aten", "triton:passes")
WARM_UP = 3


def make(method, impl):
    return dk.set_options(adapted(two_linears(32), method), impl=impl).to("cuda").train()


def loss_and_gradients(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


def record(model, x):
    """(the graph, its loss); gradients are in the parameters' own buffers."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            loss_and_gradients(model, x)
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_and_gradients(model, x)
    return graph, loss


def outcome(model, loss):
    return [loss.detach().clone(), *(p.grad.clone() for p in trained(model).values())]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_replay_is_an_eager_step(method, impl):
    """New x, new values of the parameters in place, and the masks of eager's seeds."""
    model = make(method, impl)
    x = torch.randn(64, 32, device="cuda")
    graph, loss = record(model, x)
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(64, 32, device="cuda"))
            for p in trained(model).values():
                p.mul_(1.1)
        eager = copy.deepcopy(model)
        eager.zero_grad(set_to_none=True)
        torch.cuda.manual_seed(seed)
        right = outcome(eager, loss_and_gradients(eager, x))
        for p in trained(model).values():
            p.grad.zero_()
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.testing.assert_close(outcome(model, loss), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_replay_draws_its_own_masks(method, impl):
    model = make(method, impl)
    graph, loss = record(model, torch.randn(64, 32, device="cuda"))
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) == (3 if getattr(method, "dropout", 0.0) else 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_graphed_callables_train_as_eager(method, impl):
    model = make(method, impl)
    eager = copy.deepcopy(model)
    x = torch.randn(64, 32, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    results = []
    for one, run in ((model, graphed), (eager, eager)):
        torch.cuda.manual_seed(3)
        at = x.detach().clone().requires_grad_()
        y = run(at)
        y.square().mean().backward()
        results.append([y.detach(), at.grad, *(p.grad for p in trained(one).values())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
