"""torch.compile of adapted models: no graph break, eager's numbers, and how often it compiles."""

import copy
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from tiny_models import adapted, tiny_llama, trained, two_linears
from torch._dynamo.testing import CompileCounterWithBackend

import decomp_kernels as dk
from decomp_kernels.testing import assert_as_good_as, relative_error

METHODS = {
    "lora": dk.LoRA(r=4, dropout=0.1),
    "dora": dk.DoRA(r=4, dropout=0.1),
    "ssb": dk.SSB(),
}
OTHERS = {
    "dora-peft": dk.DoRA(r=4, dropout=0.1, dropout_mode="peft"),
    "dora-norm-grad": dk.DoRA(r=4, norm_grad=True),
    "lora-bias": dk.LoRA(r=4, dropout=0.1, lora_bias=True),
    **{name: dk.methods()[name].small() for name in ("ia3", "vera", "adalora", "oft", "svdiff")},
}


@pytest.fixture(scope="module")
def _folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def _inductor(monkeypatch, _folder):
    """No code of another day, and eager's random numbers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(_folder))
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch.compiler.set_stance("default")


def compiled(model, backend="aot_eager"):
    """(the compiled model, what counts its compilations)."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def step(model, run, ids, seed, lr=0.5):
    """One step of SGD: the loss, and all gradients in one vector."""
    torch.manual_seed(seed)
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    parameters = trained(model).values()
    grads = torch.cat([p.grad.flatten() for p in parameters])
    with torch.no_grad():
        for p in parameters:
            p -= lr * p.grad
            p.grad = None
    return loss.detach(), grads


def check_training(model, run, steps, after_first=lambda: None):
    """Each step of ``run`` is as good as eager PyTorch's from the same parameters."""
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    ids = torch.randint(0, 64, (2, 8))
    for number in range(steps):
        for one in (eager, exact):
            one.load_state_dict(model.state_dict())
        runs = ((model, run), (eager, eager), (exact, exact))
        ours, plain, right = (step(one, way, ids, seed=number) for one, way in runs)
        assert_as_good_as(ours[0], plain[0], right[0], f"step {number}: loss")
        assert_as_good_as(ours[1], plain[1], right[1], f"step {number}: gradients")
        if number == 0:
            after_first()
    for name, p in trained(model).items():
        assert not torch.equal(p, start[name]), f"{name} must move"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_llama_trains_by_inductors_code(method):
    """Five steps, compiled once."""
    model = adapted(tiny_llama(), method).train()
    run, counter = compiled(model, "inductor")
    check_training(
        model, run, 5, after_first=lambda: torch.compiler.set_stance("fail_on_recompile")
    )
    assert counter.frame_count == 1
    ids = torch.randint(0, 64, (2, 8))
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(run(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == losses[1], "the same seed draws the same masks"
    assert (losses[0] != losses[2]) == hasattr(method, "dropout"), "another seed draws others"


@pytest.mark.full
@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS)
def test_a_llama_trains_by_inductors_code_with_other_methods(method):
    model = adapted(tiny_llama(), method).train()
    run, counter = compiled(model, "inductor")
    check_training(model, run, 3)
    assert counter.frame_count == 1


def test_evaluation_between_steps_compiles_once_more():
    model = adapted(tiny_llama(1), dk.LoRA(r=4, dropout=0.1))
    run, counter = compiled(model)
    ids = torch.randint(0, 64, (2, 8))
    counts = []
    for _ in range(3):
        model.train()
        step(model, run, ids, seed=0)
        model.eval()
        with torch.no_grad():
            evaluated = run(input_ids=ids).logits
            torch.testing.assert_close(evaluated, model(input_ids=ids).logits)
        counts.append(counter.frame_count)
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_gradient_checkpointing_draws_the_same_masks_again(method):
    model = adapted(tiny_llama(1), method).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook that no compiler takes, and no adapter needs here
    assert model.is_gradient_checkpointing
    run, counter = compiled(model)
    check_training(model, run, 2)
    assert counter.frame_count == 1


def test_another_sequence_length_compiles_once_more():
    model = adapted(tiny_llama(1), dk.DoRA(r=4)).train()
    run, counter = compiled(model)
    counts = []
    for length in (8, 11, 13, 16):
        ids = torch.randint(0, 64, (2, length))
        right = copy.deepcopy(model)
        ours, theirs = step(model, run, ids, 0), step(right, right, ids, 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]


@pytest.mark.parametrize("cache_norm", [False, True], ids=["each-forward", "cached"])
def test_doras_norm_is_that_of_the_trained_matrices(cache_norm):
    """Also where a step, or a load, changed them in place and no eager forward has run since."""
    model = adapted(two_linears(), dk.DoRA(r=4, cache_norm=cache_norm))
    run, counter = compiled(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
    x = torch.randn(6, 24)
    before = run(x).detach()
    for _ in range(3):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = copy.deepcopy(model).double()
    assert relative_error(before, exact(x.double())) > 1e-2, "training must move the output"
    assert_as_good_as(run(x), copy.deepcopy(model)(x), exact(x.double()), "y")
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    fresh = adapted(two_linears(), dk.DoRA(r=4, cache_norm=cache_norm))
    fresh.load_state_dict(state)
    torch.testing.assert_close(run(x), fresh(x))
    assert counter.frame_count == 1


def test_a_recorded_graph_computes_the_norm_in_each_replay(monkeypatch):
    """What a CUDA graph reads, it reads from the same memory for ever: no norm that is kept."""
    layer = adapted(two_linears(), dk.DoRA(r=4, cache_norm=True))[0]
    adapter = layer.adapters["default"]
    kept = adapter.method.norm(adapter, layer.base())
    assert adapter.method.norm(adapter, layer.base()) is kept
    monkeypatch.setattr("decomp_kernels.dispatch.recording", lambda device: True)
    fresh = adapter.method.norm(adapter, layer.base())
    assert fresh is not kept and torch.equal(fresh, kept)


def test_the_documents_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "compile.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) >= 3
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/compile.md, python block {number + 1}", "exec"), names)


# -- scale ---------------------------------------------------------------------------------------

SCALED = ("lora", "dora", "adalora", "trilora", "flora", "moslora", "pissa", "milora", "lora_dash")


def with_alpha(model, alpha):
    """A copy of the model whose adapters were made with this alpha."""
    made = copy.deepcopy(model)
    for layer in made:
        if isinstance(layer, dk.DecomposedLinear):
            adapter = layer.adapters["default"]
            adapter.method = replace(adapter.method, alpha=alpha)
    return made


def check_scales(model, run, x):
    """Loss and gradients at changing scales, against copies made with that scale."""
    outputs = []
    for alpha in (3.0, 5.0, 7.5, 1.25):
        dk.set_options(model, alpha=alpha)
        eager, exact = with_alpha(model, alpha), with_alpha(model, alpha).double()
        results = []
        for one, way, at in ((model, run, x), (eager, eager, x), (exact, exact, x.double())):
            y = way(at)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in trained(one).values())])
            one.zero_grad()
        for name, *three in zip(["y", *trained(model)], *results, strict=True):
            assert_as_good_as(*three, f"alpha={alpha}: {name}")
        outputs.append(results[0][0])
    assert min(relative_error(a, b) for a, b in pairwise(outputs)) > 1e-3, "alpha must act"


@pytest.mark.parametrize("name", SCALED)
def test_a_changing_scale_compiles_once_more_and_no_oftener(name):
    model = adapted(two_linears(), dk.methods()[name].small())
    run, counter = compiled(model)
    check_scales(model, run, torch.randn(6, 24))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)],
    ids=["fp32", "bf16-fp32"],
)
def test_a_changing_scale_in_inductors_code(dtype):
    model = adapted(two_linears().to(dtype), dk.DoRA(r=4, norm_grad=True))
    run, counter = compiled(model, "inductor")
    check_scales(model, run, torch.randn(6, 24).to(dtype))
    assert counter.frame_count == 2


def test_a_scale_that_is_dynamic_from_the_start_never_compiles_again():
    model = adapted(two_linears(), dk.DoRA(r=4))
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(6, 24)
    run(x)
    torch.compiler.set_stance("fail_on_recompile")
    check_scales(model, run, x)


def test_a_changing_scale_of_layers_that_share_their_input():
    x = torch.randn(6, 24)
    shapes = {"weight": (16, 24), "down": (4, 24), "up": (16, 4)}
    first, second = ({name: torch.randn(shapes[name]) for name in shapes} for _ in range(2))
    down, up = first["down"].requires_grad_(), first["up"].requires_grad_()

    def call(x, scale):
        return torch.cat(dk.decomposed_linears(x, [first | {"scale": scale}, second]))

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(call, fullgraph=True, backend=counter)
    for scale in (1.5, 2.5, 3.5, 4.5):
        torch.testing.assert_close(run(x, scale), call(x, scale))
        ours = torch.autograd.grad(run(x, scale).square().sum(), (down, up))
        theirs = torch.autograd.grad(call(x, scale).square().sum(), (down, up))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert counter.frame_count == 2


def test_states_that_were_seen_before_are_not_compiled_again():
    """Another adapter, the base inside ``disable``, merged weights; and back."""
    model = adapted(two_linears(), dk.LoRA(r=4))
    adapted(model, dk.SSB(), adapter_name="other")
    run, counter = compiled(model)
    x, counts = torch.randn(6, 24), []

    def agree():
        torch.testing.assert_close(run(x), model(x))

    for _ in range(3):
        for name in ("default", "other"):
            dk.set_adapter(model, name)
            agree()
        with dk.disable(model):
            agree()
        dk.merge(model)
        agree()
        dk.unmerge(model)
        counts.append(counter.frame_count)
    assert counts[0] >= 3 and counts[1:] == counts[1:2] * 2, counts
