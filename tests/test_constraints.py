"""MPC_o and MPC_d against autograd of the plain formula in float64, and against PEFT's AdaLoRA."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import decomp_kernels as dk
from decomp_kernels.kernels.aten import gram as aten_gram
from decomp_kernels.ops.gram import bwd, fwd, gram_penalty
from decomp_kernels.testing import assert_as_good_as, relative_error

LOW_RANK = (
    dk.LoRA(r=3), dk.DoRA(r=3), dk.AdaLoRA(r=3, target_r=2), dk.TriLoRA(r=3), dk.FLoRA(r=3),
    dk.MoSLoRA(r=3), dk.LoRADash(r=3), dk.PiSSA(r=3), dk.MiLoRA(r=3), dk.ParallelAdapter(r=3),
    dk.SeriesAdapter(r=3), dk.LieRA(r=3), dk.HiRA(r=3),
)  # fmt: skip
SIZES = ((12, 9), (9, 12), (12, 9), (12, 12), (9, 12))  # (K, N) of the layers: some repeat
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
kinds = pytest.mark.parametrize("kind", ["o", "d"])
squares = pytest.mark.parametrize("squared", [True, False], ids=["squared", "norm"])
impls = pytest.mark.parametrize("impl", ["reference", "aten"])


def plain(downs, ups, kind="o", squared=True):
    """The sum of all penalties, one matrix after the other, in float32 or wider."""
    total = 0.0
    for matrices, of_rows in ((downs, True), (ups, False)):
        for matrix in matrices:
            M = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            gram = M @ M.T if of_rows else M.T @ M
            E = gram - torch.eye(len(gram), dtype=gram.dtype)
            if kind == "d" and not of_rows:
                E = gram - torch.diag(gram.diagonal())
            total = total + (E.square().sum() if squared else torch.linalg.matrix_norm(E))
    return total


def matrices(shapes, dtype=torch.float64, seed=0):
    """Random downs and ups of these (r, K, N), with gradients."""
    gen = torch.Generator().manual_seed(seed)

    def draw(rows, cols):
        drawn = torch.randn(rows, cols, generator=gen, dtype=torch.float64) * 0.4
        return drawn.to(dtype).requires_grad_()

    return [draw(r, K) for r, K, _ in shapes], [draw(N, r) for r, _, N in shapes]


def outcome(loss, tensors):
    return loss, *torch.autograd.grad(loss, tensors)


def adapted(method, dtype=None, sizes=SIZES):
    """A model with ``method`` away from its start on every layer."""
    model = nn.ModuleList(nn.Linear(K, N) for K, N in sizes)
    if dtype is not None:
        model.to(dtype)
    dk.adapt(model, method, "all-linear")
    stir(model)
    return model


def stir(model):
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)


def pairs(model, name="default"):
    adapters = [layer.adapters[name] for layer in model]
    return [a.down for a in adapters], [a.up for a in adapters]


@impls
@squares
@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_matches_the_formula(dtype, kind, squared, impl):
    shapes = [(4, K, N) for K, N in SIZES] + [(2, 12, 9), (1, 5, 7), (2, 12, 9)]
    downs, ups = matrices(shapes, dtype)
    exact_downs, exact_ups = matrices(shapes, dtype)
    exact_downs = [t.detach().double().requires_grad_() for t in exact_downs]
    exact_ups = [t.detach().double().requires_grad_() for t in exact_ups]
    loss = gram_penalty(downs, ups, kind, squared=squared, scale=0.3, impl=impl)
    ours = outcome(loss, downs + ups)
    eager = outcome(0.3 * plain(downs, ups, kind, squared), downs + ups)
    exact_loss = 0.3 * plain(exact_downs, exact_ups, kind, squared)
    exact = outcome(exact_loss, exact_downs + exact_ups)
    assert loss.shape == ()
    for index, (value, other, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        assert value.dtype == other.dtype
        if dtype == torch.float64:
            assert relative_error(value, truth) < 1e-13, index
        else:
            assert_as_good_as(value, other, truth, str(index))


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from((1, 3, 8)), st.sampled_from((2, 5))),
        min_size=1,
        max_size=9,
    ),
    dtype=st.lists(st.sampled_from((torch.float64, torch.float32)), min_size=2, max_size=2),
    kind=st.sampled_from(("o", "d")),
    squared=st.booleans(),
)
def test_any_mixture_of_shapes_and_dtypes(shapes, dtype, kind, squared):
    downs, ups = matrices(shapes)
    downs = [t.detach().to(dtype[i % 2]).requires_grad_() for i, t in enumerate(downs)]
    ups = [t.detach().to(dtype[i % 2]).requires_grad_() for i, t in enumerate(ups)]
    ours = outcome(gram_penalty(downs, ups, kind, squared=squared), downs + ups)
    exact_downs, exact_ups = ([t.detach().double() for t in ts] for ts in (downs, ups))
    for t in (*exact_downs, *exact_ups):
        t.requires_grad_()
    exact = outcome(plain(exact_downs, exact_ups, kind, squared), exact_downs + exact_ups)
    eager = outcome(plain(downs, ups, kind, squared), downs + ups)
    for index, (value, other, truth) in enumerate(zip(ours, eager, exact, strict=True)):
        coarsest = torch.float32 if torch.float32 in dtype else torch.float64
        assert_as_good_as(value, other, truth, str(index), None if index else coarsest)


@kinds
@squares
def test_blocks_make_no_difference(kind, squared, monkeypatch):
    downs, ups = matrices([(3, 8, 5)] * 7)
    whole = outcome(gram_penalty(downs, ups, kind, squared=squared), downs + ups)
    monkeypatch.setattr(aten_gram, "_BLOCK_ELEMENTS", 50)  # two matrices a block, and one over
    parts = outcome(gram_penalty(downs, ups, kind, squared=squared), downs + ups)
    for one, other in zip(whole, parts, strict=True):
        assert relative_error(one, other) < 1e-13


@impls
@squares
@kinds
def test_hand_written_backward_passes_gradcheck(kind, squared, impl):
    downs, ups = matrices([(2, 4, 3), (2, 4, 3), (3, 4, 5)])

    def call(*tensors):
        return gram_penalty(tensors[:3], tensors[3:], kind, squared=squared, scale=0.7, impl=impl)

    assert torch.autograd.gradcheck(call, (*downs, *ups))


@impls
@squares
@kinds
def test_registration(kind, squared, impl):
    for dtype in (torch.float32, torch.bfloat16):
        downs, ups = (
            [t.detach() for t in ts] for ts in matrices([(2, 4, 3), (3, 4, 3), (2, 4, 3)], dtype)
        )
        torch.library.opcheck(fwd, (downs, ups, kind, squared, 0.5, impl))
        loss, residuals = fwd(downs, ups, kind, squared, 0.5, impl)
        torch.library.opcheck(bwd, (loss, downs, ups, residuals, squared, 0.5, impl))


@impls
@squares
@kinds
def test_no_nan_where_a_residual_is_zero(kind, squared, impl):
    """B = 0, as LoRA starts, and orthonormal A: unsquared, the plain derivative is 0 / 0."""
    down = torch.eye(3, 6, dtype=torch.float64).requires_grad_()
    up = torch.zeros(5, 3, dtype=torch.float64).requires_grad_()
    loss = gram_penalty([down], [up], kind, squared=squared, impl=impl)
    assert loss.item() == pytest.approx({"o": 3.0 if squared else 3**0.5, "d": 0.0}[kind])
    for grad in torch.autograd.grad(loss, (down, up)):
        assert torch.equal(grad, torch.zeros_like(grad))


@kinds
@squares
@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_over_matrices"])
def test_a_whole_model(kind, squared, reduction):
    model = adapted(dk.LoRA(r=3), torch.float64)
    downs, ups = pairs(model)
    count = {"sum": 1, "mean": len(SIZES), "mean_over_matrices": 2 * len(SIZES)}[reduction]
    loss = dk.mpc_loss(model, kind, 0.25, squared=squared, reduction=reduction)
    exact = 0.25 / count * plain(downs, ups, kind, squared)
    for ours, truth in zip(outcome(loss, downs + ups), outcome(exact, downs + ups), strict=True):
        assert relative_error(ours, truth) < 1e-13


@pytest.mark.parametrize("method", LOW_RANK, ids=lambda m: m.name)
def test_every_trained_pair_counts_and_nothing_frozen(method):
    """PiSSA's down0 and up0, LoRA-Dash's directions and FLoRA's core are no part of it."""
    model = adapted(method, torch.float64)
    loss = dk.mpc_loss(model, "d", 1.0)
    assert relative_error(loss, plain(*pairs(model), "d")) < 1e-13
    loss.backward()
    for name, tensor in model.named_parameters():
        assert (tensor.grad is not None) == (name.endswith((".down", ".up"))), name


def test_ranks_and_methods_may_differ_from_layer_to_layer():
    model = nn.ModuleList(nn.Linear(12, 9, dtype=torch.float64) for _ in range(3))
    dk.adapt(model, dk.LoRA(r=4), ["0", "1"], rank_pattern={"1": 2})
    dk.adapt(model, dk.SSB(), ["2"])
    stir(model)
    dk.set_adapter(model, "default")
    downs, ups = pairs(model[:2])
    assert [len(down) for down in downs] == [4, 2]
    assert relative_error(dk.mpc_loss(model, "o", 1.0), plain(downs, ups)) < 1e-13


def test_only_the_active_adapter_counts():
    model = adapted(dk.LoRA(r=3), torch.float64)
    dk.adapt(model, dk.TriLoRA(r=2), "all-linear", adapter_name="second")
    stir(model)
    for name in ("second", "default"):
        dk.set_adapter(model, name)
        for tensor in model.parameters():
            tensor.grad = None
        loss = dk.mpc_loss(model, "o", 1.0)
        assert relative_error(loss, plain(*pairs(model, name))) < 1e-13
        loss.backward()
        trained = {n for n, tensor in model.named_parameters() if tensor.grad is not None}
        expected = {f"{i}.adapters.{name}.{part}" for i in range(5) for part in ("down", "up")}
        assert trained == expected


def test_a_tied_layer_counts_once():
    linear = nn.Linear(6, 6, dtype=torch.float64)
    model = nn.ModuleList([linear, linear])
    dk.adapt(model, dk.LoRA(r=2), "all-linear")
    stir(model)
    adapter = linear.adapters["default"]
    assert relative_error(dk.mpc_loss(model, "o", 1.0), plain([adapter.down], [adapter.up])) < 1e-13


@pytest.mark.parametrize(
    "method",
    [dk.SSL(), dk.SSB(), dk.IA3(), dk.BitFit(), dk.VeRA(r=4), dk.SpectralAdditive(r=3)],
    ids=lambda m: m.name,
)
def test_a_model_without_a_trained_pair_is_refused(method):
    model = adapted(method)
    with pytest.raises(ValueError, match="must have an active adapter that trains A = down and B"):
        dk.mpc_loss(model)
    with pytest.raises(ValueError, match="must have an active adapter"):
        dk.mpc_loss(nn.Linear(3, 3))
    frozen = adapted(dk.LoRA(r=2)).requires_grad_(False)
    with pytest.raises(ValueError, match="must have an active adapter"):
        dk.mpc_loss(frozen)


def test_bad_calls_say_what_is_wrong():
    model = adapted(dk.LoRA(r=2))
    with pytest.raises(ValueError, match=r'got "n": MPC_n is .* LoRA\(activation="relu"\)'):
        dk.mpc_loss(model, "n")
    with pytest.raises(ValueError, match="""kind must be "o" or "d", got 'x'"""):
        dk.mpc_loss(model, "x")
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, mean_over_matrices"):
        dk.mpc_loss(model, reduction="max")
    for coef in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="coef must be finite and at least 0"):
            dk.mpc_loss(model, "o", coef)
    down, up = torch.ones(2, 3), torch.ones(3, 2)
    with pytest.raises(ValueError, match="at least one down and one up"):
        gram_penalty([], [])
    with pytest.raises(ValueError, match=r"downs must be matrices, got shape \(3,\)"):
        gram_penalty([down[0]], [up])
    with pytest.raises(TypeError, match="ups must be floating point, got torch.int64"):
        gram_penalty([down], [up.long()])
    with pytest.raises(ValueError, match="kind must be one of o, d, got 'n'"):
        gram_penalty([down], [up], "n")
    with pytest.raises(ValueError, match="impl must be one of auto"):
        gram_penalty([down], [up], impl="cuda")


def test_second_order_gradients_are_refused():
    downs, ups = matrices([(2, 4, 3)])
    loss = gram_penalty(downs, ups)
    (grad,) = torch.autograd.grad(loss, downs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
        grad.sum().backward()


def test_compiles_with_the_model_without_a_graph_break():
    model = adapted(dk.LoRA(r=2), sizes=((6, 6), (6, 6), (6, 6)))
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    x = torch.randn(4, 6)

    def loss():
        y = x
        for layer in model:
            y = layer(y)
        return y.square().mean() + dk.mpc_loss(model, "d", 0.1, reduction="mean")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(outcome(compiled(), tensors), outcome(loss(), tensors), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_does_not_lower_the_precision(dtype, impl):
    downs, ups = matrices([(3, 40, 30), (2, 12, 9)], dtype)
    outside = outcome(gram_penalty(downs, ups, impl=impl), downs + ups)
    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(gram_penalty(downs, ups, impl=impl), downs + ups)
    assert outside[0].dtype == torch.float32
    for one, other in zip(outside, inside, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_same_inputs_same_bits():
    model = adapted(dk.LoRA(r=3), torch.bfloat16)
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    first, second = (outcome(dk.mpc_loss(model), tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_nothing_but_small_residuals_is_kept_for_backward():
    model = adapted(dk.LoRA(r=3))
    parameters = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dk.mpc_loss(model)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    extra = sum(size for pointer, size in storages.items() if pointer not in parameters)
    assert extra == 2 * len(SIZES) * 3 * 3 * 4


def test_grows_in_calls_with_the_shapes_and_not_with_the_layers():
    counts = []
    for layers in (4, 40):
        downs, ups = ([t.detach() for t in ts] for ts in matrices([(2, 8, 6)] * layers))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            loss, residuals = fwd(downs, ups, "o", True, 1.0, "aten")
            bwd(loss, downs, ups, residuals, True, 1.0, "aten")
        counts.append(sum(event.name.startswith("aten::") for event in run.events()))
    assert counts[0] == counts[1] > 0


@kinds
@squares
def test_training_reduces_it(kind, squared):
    model = adapted(dk.LoRA(r=3))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = dk.mpc_loss(model, kind, 1.0, squared=squared)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_beside_a_task_loss_the_gradients_add():
    model = adapted(dk.LoRA(r=3), torch.float64, ((6, 6), (6, 6)))
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]

    def task():
        return model[1](model[0](torch.ones(2, 6, dtype=torch.float64))).square().sum()

    (task() + dk.mpc_loss(model)).backward()
    apart = zip(
        torch.autograd.grad(task(), tensors),
        torch.autograd.grad(dk.mpc_loss(model), tensors),
        strict=True,
    )
    for tensor, (one, other) in zip(tensors, apart, strict=True):
        assert relative_error(tensor.grad, one + other) < 1e-13
    before = [tensor.grad.clone() for tensor in tensors]
    dk.mpc_loss(model).backward()  # accumulates into .grad
    for tensor, grad in zip(tensors, before, strict=True):
        own = torch.autograd.grad(dk.mpc_loss(model), tensor)[0]
        assert relative_error(tensor.grad, grad + own) < 1e-13


def test_is_adaloras_own_regulariser():
    """PEFT adds orth_reg_weight * mean over matrices of ||E||_F to outputs.loss."""
    from peft import AdaLoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 7)

        def forward(self, x):
            return SimpleNamespace(loss=0.0 * self.second(self.first(x)).sum())

    base = Model().double()
    ours = dk.adapt(
        nn.ModuleList([nn.Linear(12, 9), nn.Linear(9, 7)]).double(),
        dk.AdaLoRA(r=4, target_r=2),
        "all-linear",
    )
    config = AdaLoraConfig(
        target_modules=["first", "second"], init_r=4, target_r=2, total_step=10, orth_reg_weight=0.7
    )
    theirs = get_peft_model(base, config)
    stir(theirs)
    layers = theirs.base_model.model
    for mine, layer in zip(ours, (layers.first, layers.second), strict=True):
        with torch.no_grad():
            mine.adapters["default"].down.copy_(layer.lora_A["default"])
            mine.adapters["default"].up.copy_(layer.lora_B["default"])
    expected = theirs.base_model(torch.ones(1, 12, dtype=torch.float64)).loss
    loss = dk.mpc_loss(ours, "o", 0.7, squared=False, reduction="mean_over_matrices")
    assert relative_error(loss, expected) < 1e-13
    expected.backward()
    loss.backward()
    for mine, layer in zip(ours, (layers.first, layers.second), strict=True):
        adapter = mine.adapters["default"]
        assert relative_error(adapter.down.grad, layer.lora_A["default"].grad) < 1e-12
        assert relative_error(adapter.up.grad, layer.lora_B["default"].grad) < 1e-12


def test_mpc_n_is_the_parallel_adapter():
    """y = x W^T + b + relu(x A^T) B^T: LoRA with alpha = r and a relu."""
    linear = nn.Linear(12, 9, dtype=torch.float64)
    lora = dk.DecomposedLinear(linear, dk.LoRA(r=3, alpha=3, activation="relu"))
    other = nn.Linear(12, 9, dtype=torch.float64)
    other.load_state_dict(linear.state_dict())
    parallel = dk.DecomposedLinear(other, dk.ParallelAdapter(r=3))
    stir(lora)
    mine, theirs = lora.adapters["default"], parallel.adapters["default"]
    with torch.no_grad():
        theirs.down.copy_(mine.down)
        theirs.up.copy_(mine.up)
    x = torch.randn(5, 12, dtype=torch.float64)
    formula = x @ linear.weight.T + linear.bias + torch.relu(x @ mine.down.T) @ mine.up.T
    expected = outcome(formula.square().sum(), [mine.down, mine.up])
    for layer, adapter in ((lora, mine), (parallel, theirs)):
        ours = outcome(layer(x).square().sum(), [adapter.down, adapter.up])
        for value, truth in zip(ours, expected, strict=True):
            assert relative_error(value, truth) < 1e-13


def test_the_documents_examples_run():
    text = (Path(__file__).parent.parent / "docs" / "mpc.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/mpc.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("kind", "share"), [("d", 4 / 9), ("o", 13 / 9)])
def test_the_penalty_at_loras_start_is_what_the_document_says(kind, share):
    model = dk.adapt(nn.Sequential(nn.Linear(4096, 64)), dk.LoRA(r=8), "all-linear")
    assert dk.mpc_loss(model, kind, 1.0).item() == pytest.approx(8 * share, rel=0.05)
