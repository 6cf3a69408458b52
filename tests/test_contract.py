"""The contract that every method keeps.  A new file in methods/ is tested here without an edit.

All but the first test leave the starting point: there most bugs cannot be seen.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import decomp_kernels as dk
from decomp_kernels.methods.base import METHODS
from decomp_kernels.testing import assert_as_good_as, relative_error

K, N = 24, 40
every_method = pytest.mark.parametrize("name", sorted(METHODS))


def make_layer(name, dtype=torch.float64, bias=True, shape=(K, N), adapter_dtype=None, **options):
    method = METHODS[name].small()
    method = replace(method, **options) if options else method
    return dk.DecomposedLinear(
        nn.Linear(*shape, bias=bias, dtype=dtype), method, dtype=adapter_dtype
    ).eval()


def perturb(layer, size=0.2):
    """Move every trained tensor, so that the adapter changes the output by far more than errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in layer.parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((size * noise).to(tensor.dtype))
    for module in layer.modules():
        if isinstance(module, dk.DecomposedLinear):
            adapter = module.adapters[module.active_adapter]
            if hasattr(adapter.method, "select_directions"):  # LoRA-Dash after its warm-up
                adapter.method.select_directions(adapter, module.base())
    return layer


def base_output(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def moved(layer, x):
    """How far the adapter moves the output, relative to the output."""
    return relative_error(layer(x), base_output(layer, x))


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def dense(layer, x):
    """The definition: x times the merged weight, which autograd differentiates."""
    adapter = layer.adapters[layer.active_adapter]
    weight, bias = adapter.method.merged(adapter, layer.base())
    return F.linear(x, weight, bias)


def gradients(output, layer, x, dy):
    leaves = {"x": x, **trained(layer)}
    grads = torch.autograd.grad(output, list(leaves.values()), dy, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


@every_method
def test_starts_as_the_linear(name):
    if not METHODS[name].identity_at_start:
        pytest.fail(f"{name} must start as the linear it replaces")
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        for bias in (True, False):
            layer = make_layer(name, dtype, bias)
            x = torch.randn(3, 5, K).to(dtype)
            assert relative_error(layer(x), base_output(layer, x)) < bound


@every_method
def test_every_parameter_exists_before_the_first_forward_and_trains(name):
    layer = make_layer(name, torch.float32).train()
    before = dict(layer.named_parameters())
    perturb(layer)
    values = {n: p.detach().clone() for n, p in before.items()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(16, K)
    layer(x).square().mean().backward()
    for n, p in layer.named_parameters():
        assert before[n] is p, f"{n} was made in forward"
        assert (p.grad is not None) == p.requires_grad, n
        assert p.requires_grad == (n not in ("weight", "bias") and _not_frozen(layer, n)), n
    optimizer.step()
    for n, p in layer.named_parameters():
        assert torch.equal(p, values[n]) != p.requires_grad, f"{n} must move iff it is trained"


def _not_frozen(layer, name):
    return name.removeprefix("adapters.default.") not in layer.adapters["default"].frozen


@every_method
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradients_are_those_of_the_dense_weight(name, bias):
    layer = perturb(make_layer(name, bias=bias))
    x = torch.randn(3, 5, K, dtype=torch.float64, requires_grad=True)
    if layer.adapters["default"].method.why_not_mergeable is not None:
        assert name in ("parallel_adapter", "series_adapter"), "others are linear maps of x"
        assert torch.autograd.gradcheck(layer, (x,))
        return
    assert moved(layer, x) > 1e-2
    y, expected = layer(x), dense(layer, x)
    assert relative_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    ours, theirs = gradients(y, layer, x, dy), gradients(expected, layer, x, dy)
    for leaf, grad in ours.items():
        assert relative_error(grad, theirs[leaf]) < 1e-10, leaf


@every_method
def test_backward_passes_gradcheck(name):
    layer = perturb(make_layer(name))
    names = list(trained(layer))
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach().clone().requires_grad_() for p in trained(layer).values())
    if name == "dora":  # its norm is a constant for the gradient, by definition
        layer.adapters["default"].method = replace(layer.adapters["default"].method, norm_grad=True)
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@every_method
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=["fp32", "bf16", "bf16-fp32", "fp16", "fp16-fp32"],
)
def test_lower_precision_is_as_good_as_eager(name, dtype, adapter_dtype):
    """Against float64, no worse than the dense definition run by autograd in the same dtypes."""
    layer = perturb(make_layer(name, dtype, adapter_dtype=adapter_dtype))
    exact = copy.deepcopy(layer).double()
    for method in (layer.adapters["default"].method,):
        if method.why_not_mergeable is not None:
            x = torch.randn(64, K).to(dtype)
            y = layer(x)
            assert relative_error(y, exact(x.double())) < 4 * torch.finfo(dtype).eps
            return
    x = torch.randn(64, K).to(dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    assert moved(layer, x) > 1e-2
    y, truth, eager = layer(x), dense(exact, x_exact), dense(layer, x)
    dy = torch.randn_like(y)
    ours = {"y": y, **gradients(y, layer, x, dy)}
    plain = {"y": eager, **gradients(eager, layer, x, dy)}
    right = {"y": truth, **gradients(truth, exact, x_exact, dy.double())}
    for leaf in ours:
        assert_as_good_as(ours[leaf], plain[leaf], right[leaf], leaf, dtype)


@every_method
def test_merge_and_unmerge(name):
    layer = perturb(make_layer(name))
    x = torch.randn(7, K, dtype=torch.float64)
    before, weight, bias = layer(x), layer.weight.clone(), layer.bias.clone()
    method = layer.adapters["default"].method
    if method.why_not_mergeable is not None:
        with pytest.raises(ValueError, match="cannot be merged"):
            dk.merge(layer)
        assert layer.merged_adapter is None and torch.equal(layer.weight, weight)
        return
    dk.merge(layer)
    assert type(layer)._refresh and layer.merged_adapter == "default"
    assert relative_error(F.linear(x, layer.weight, layer.bias), before) < 1e-12
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    dk.unmerge(layer)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
    assert torch.equal(layer(x), before)


@every_method
def test_the_base_can_always_be_had_back(name):
    linear = nn.Linear(K, N, dtype=torch.float64)
    model = nn.Sequential(linear, nn.Tanh())
    x = torch.randn(5, K, dtype=torch.float64)
    base, weight, values = model(x), linear.weight, linear.weight.detach().clone()
    dk.adapt(model, METHODS[name].small(), ["0"])
    assert model[0].weight is weight
    perturb(model)
    model.eval()
    assert relative_error(model(x), base) > 1e-3
    with dk.disable(model):
        assert torch.equal(model(x), base)
    dk.remove(model)
    assert type(model[0]) is nn.Linear and model[0].weight is weight
    assert torch.equal(weight, values) and torch.equal(model(x), base)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@every_method
def test_copies_pickles_and_state_dicts(name):
    layer = perturb(make_layer(name, torch.float32))
    x = torch.randn(4, K)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), before)
    fresh = make_layer(name, torch.float32)
    assert not torch.equal(fresh(x), before)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), before)
    untouched = {k: v for k, v in layer.state_dict().items() if not k.startswith("adapters.")}
    assert set(untouched) == {"weight", "bias"}


@every_method
def test_compiles_without_a_graph_break(name):
    layer = perturb(make_layer(name, torch.float32)).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, K, requires_grad=True)
    torch.manual_seed(3)
    eager = layer(x)
    torch.manual_seed(3)
    traced = compiled(x)
    dy = torch.randn_like(eager)
    ours, theirs = gradients(traced, layer, x, dy), gradients(eager, layer, x, dy)
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
    for leaf in ours:
        torch.testing.assert_close(ours[leaf], theirs[leaf], rtol=1e-3, atol=1e-4, msg=leaf)


@every_method
@pytest.mark.parametrize("shape", [(24, 24), (36, 8), (8, 36)], ids=str)
def test_wide_and_tall_layers(name, shape):
    layer = perturb(make_layer(name, shape=shape))
    x = torch.randn(6, shape[0], dtype=torch.float64)
    assert layer(x).shape == (6, shape[1])
    assert layer(x[0]).shape == (shape[1],)
    assert layer(x[:0]).shape == (0, shape[1])
    assert relative_error(layer(x[0]), layer(x)[0]) < 1e-12
    strided = torch.randn(shape[0], 6, dtype=torch.float64).T
    assert relative_error(layer(strided), layer(strided.contiguous())) < 1e-12


@every_method
def test_odd_sizes_work_or_say_why_not(name):
    try:
        layer = perturb(make_layer(name, shape=(23, 37)))
    except ValueError as error:
        assert "23" in str(error) or "37" in str(error), "the message must name the size"
        assert "divi" in str(error), "only block structure may refuse a shape"
        return
    x = torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    if layer.adapters["default"].method.why_not_mergeable is None:
        assert relative_error(y, dense(layer, x)) < 1e-12


@every_method
def test_converting_the_model_converts_the_adapter(name):
    layer = perturb(make_layer(name, torch.float32))
    exact = copy.deepcopy(layer).double()
    x = torch.randn(64, K, dtype=torch.float64)
    truth = exact(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        converted = copy.deepcopy(layer).to(dtype)
        assert all(t.dtype == dtype for t in converted.parameters())
        y = converted(x.to(dtype))
        assert y.dtype == dtype
        assert relative_error(y, truth) < 8 * torch.finfo(dtype).eps


@every_method
def test_runs_under_autocast(name):
    layer = perturb(make_layer(name, torch.float32)).train()
    x = torch.randn(32, K, requires_grad=True)
    truth = copy.deepcopy(layer).eval().double()(x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.eval()(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, truth) < 8 * torch.finfo(torch.bfloat16).eps
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


@every_method
def test_meta_device_then_initialize(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N))
    dk.adapt(model, METHODS[name].small(), ["0"])
    assert all(p.device.type == "meta" for p in model.parameters())
    loaded = nn.Linear(K, N)
    model.load_state_dict(
        {"0.weight": loaded.weight.detach(), "0.bias": loaded.bias.detach()},
        strict=False, assign=True,
    )  # fmt: skip
    x = torch.randn(3, K)
    with pytest.raises(RuntimeError, match="initialize"):
        model(x)
    dk.initialize(model)
    assert relative_error(model.eval()(x), loaded(x)) < 3e-6
    assert {n: p.shape for n, p in model.named_parameters()} == {
        f"0.{n}": p.shape for n, p in make_layer(name, torch.float32).named_parameters()
    }
    model(x).sum().backward()


@every_method
def test_two_adapters(name):
    model = nn.Sequential(nn.Linear(K, N))
    x = torch.randn(4, K)
    dk.adapt(model, METHODS[name].small(), ["0"], adapter_name="first")
    first = perturb(model.eval())(x)
    dk.adapt(model, METHODS[name].small(), ["0"], adapter_name="second")
    second = perturb(model.eval(), size=0.4)(x)
    assert not torch.equal(first, second)
    dk.set_adapter(model, "first")
    assert torch.equal(model(x), first)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".adapters.first." in f".{n}" for n in names)


@every_method
def test_says_what_it_is(name):
    method = METHODS[name].small()
    assert METHODS[name].name == name and getattr(dk, type(method).__name__) is METHODS[name]
    for text in (method.formula, method.citation, method.trains, method.peft):
        assert isinstance(text, str) and text
    assert type(method).__doc__ or __import__(type(method).__module__, fromlist=["_"]).__doc__
    with pytest.raises(TypeError, match="has no option 'nonsense'; its options are"):
        METHODS[name](nonsense=1)
    if hasattr(method, "r"):
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"r must be at least 1, got {bad}"):
                METHODS[name](r=bad)


def test_the_registry_holds_every_method_of_the_paper_and_its_relatives():
    expected = """
        ssl ssb ia3 bitfit sam_parser svdiff pissa milora oft boft hra sparse diff_pruning lora
        adalora trilora flora moslora liera hira lora_dash parallel_adapter series_adapter dora
        spectral_additive spectral_rotational vera loha lokr
    """
    assert set(expected.split()) <= set(dk.methods())
