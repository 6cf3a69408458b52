"""Several decomposed linears of one x as one operator, against separate calls; planted bugs."""

import itertools

import grouped_checks as checks
import pytest
import torch
import triton_grouped_mutants as planted
import triton_mutants
from grouped_checks import LAYERS, exactly, make, outcome, separately, trained

import decomp_kernels as dk
from decomp_kernels import dispatch
from decomp_kernels.factors import Hadamard
from decomp_kernels.kernels import gemm
from decomp_kernels.ops import grouped_linear
from decomp_kernels.ops.grouped_linear import TENSORS, TRAINED, bwd, decomposed_linears, fwd
from decomp_kernels.reference.dropout import keep_mask

IMPLS = ("reference", "aten", "triton:passes")
impls = pytest.mark.parametrize("impl", IMPLS)
QKV = ("lora", "dropout", "another mask")


@impls
@pytest.mark.parametrize("dtype", checks.ALL)
def test_as_good_as_separate_calls(dtype, impl):
    if dtype == "fp64" and impl == "triton:passes":
        pytest.skip("Triton has no float64")
    checks.check(LAYERS, dtype, impl)


@impls
def test_every_pair_of_layers(impl):
    for pair in itertools.combinations(LAYERS, 2):
        checks.check(pair, "fp32", impl, shape=(7,), K=13)


@impls
@pytest.mark.parametrize("shape", [(), (0,), (2, 1, 7), (70,)], ids=str)
def test_odd_shapes(shape, impl):
    for dtype in ("fp32", "bf16-fp32"):
        checks.check(QKV, dtype, impl, shape=shape, K=33)


@impls
def test_only_what_is_asked_for(impl):
    for asked in ("x", "down", "in_scale", "out_scale", "core", "up", "bias"):
        x, layers = make(LAYERS, "fp32")
        x.requires_grad_(asked == "x")
        for layer, name in itertools.product(layers, TRAINED):
            if name in layer:
                layer[name].requires_grad_(name == asked)
        ys = decomposed_linears(x, layers, impl=impl)
        assert [y.requires_grad for y in ys] == [True] * len(ys)
        exact = exactly_of_graph(x, layers)
        dys = [torch.ones_like(y) for y in ys]
        grads = torch.autograd.grad(ys, list(trained(x, layers).values()), dys)
        for one, other in zip(grads, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def exactly_of_graph(x, layers):
    ys = [y for y in separately(x, layers) if y.requires_grad]
    return torch.autograd.grad(
        ys, list(trained(x, layers).values()), [torch.ones_like(y) for y in ys]
    )


@impls
def test_seeds_and_masks_are_those_of_separate_calls(impl):
    x = torch.ones(9, 12)
    eye = torch.eye(12)
    layers = [
        {"weight": torch.zeros(12, 12), "down": eye, "up": eye, "dropout": p}
        for p in (0.3, 0.0, 0.6)
    ]
    torch.manual_seed(5)
    together = decomposed_linears(x, layers, impl=impl)
    torch.manual_seed(5)
    for one, other in zip(together, separately(x, layers), strict=True):
        torch.testing.assert_close(one, other)
    seed = torch.tensor(7)
    given = [layer | {"seed": seed} for layer in layers]
    assert torch.equal(
        decomposed_linears(x, given, impl=impl)[2] != 0, keep_mask(seed, (9, 12), 0.6)
    )


@impls
def test_same_inputs_same_bits(impl):
    first, second = (
        outcome(decomposed_linears(x, layers, impl=impl), x, layers)
        for x, layers in (make(LAYERS, "bf16-fp32"), make(LAYERS, "bf16-fp32"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradcheck():
    x, layers = make(("dropout", "everything"), "fp64", shape=(3,), K=5)
    wanted = trained(x, layers)

    def call(*values):
        at = dict(zip(wanted, values, strict=True))
        new = [
            {name: at.get(f"{number}.{name}", value) for name, value in layer.items()}
            for number, layer in enumerate(layers)
        ]
        return tuple(decomposed_linears(at["x"], new, impl="aten"))

    assert torch.autograd.gradcheck(call, tuple(wanted.values()))


def test_x_is_read_once_for_the_branches_without_dropout(monkeypatch):
    calls = []
    project = gemm.project
    monkeypatch.setattr(gemm, "project", lambda *args: calls.append(1) or project(*args))
    x, layers = make(("lora", "dora", "everything"), "fp32")
    decomposed_linears(x, layers, impl="aten")
    assert len(calls) == 1


def test_triton_reads_x_once(monkeypatch):
    from decomp_kernels.kernels.triton import column_walk, down_projection

    launches = []
    for module in (column_walk, down_projection):
        run = module._launch

        def launch(big, *others, run=run):
            launches.append(big.shape)
            return run(big, *others)

        monkeypatch.setattr(module, "_launch", launch)
    x, layers = make(("lora", "dropout", "another mask"), "fp32", shape=(6,), K=29)
    outcome(decomposed_linears(x, layers, impl="triton:passes"), x, layers)
    assert launches.count((6, 29)) == 2  # once forward, once backward


def test_layers_that_cannot_share_are_calls_of_their_own(monkeypatch):
    x, layers = make(QKV, "fp32")
    K = x.shape[-1]
    weight = torch.randn(9, K)
    others = [
        {"weight": torch.randn(9, K).requires_grad_()},
        {"weight": weight, "addend": torch.randn(*x.shape[:-1], 9)},
        {"weight": weight, "weight_map": Hadamard(torch.randn(9, 2), torch.randn(2, K), 0.5)},
        {"weight": weight, "out_scale": torch.ones(9, requires_grad=True), "save_output": True},
    ]
    mixed = [others[0], layers[0], others[1], layers[1], others[2], layers[2], others[3]]
    grouped = []
    apply = grouped_linear._GroupedLinear.apply
    monkeypatch.setattr(
        grouped_linear._GroupedLinear,
        "apply",
        lambda *args: grouped.append(len(args[0].scales)) or apply(*args),
    )
    found = outcome(decomposed_linears(x, mixed), x, mixed)
    for name, value in outcome(separately(x, mixed), x, mixed).items():
        torch.testing.assert_close(found[name], value)
    assert grouped == [3]
    decomposed_linears(x, layers[:1])
    assert grouped == [3]
    x, layers = make(QKV, "bf16")
    wide = layers[1] | {name: layers[1][name].float() for name in ("down", "up")}
    decomposed_linears(x, [layers[0], wide])
    assert grouped == [3]
    assert decomposed_linears(x, []) == []


def test_an_output_that_is_not_used():
    x, layers = make(QKV, "fp32")
    y = decomposed_linears(x, layers)[1]
    y.sum().backward()
    expected = torch.autograd.grad(separately(x, layers)[1].sum(), layers[1]["down"])[0]
    torch.testing.assert_close(layers[1]["down"].grad, expected)


@impls
def test_registration(impl):
    x, layers = make(("dropout", "everything", "no branch"), "fp32")
    options = {"scale": 1.0, "dropout": 0.0, "activation": "identity"}
    full = [dict.fromkeys(TENSORS) | options | layer for layer in layers]
    full = [
        {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in layer.items()}
        for layer in full
    ]
    lists = [[layer[name] for layer in full] for name in (*TENSORS, *options)]
    args = (x.detach(), *lists, [True, False, True, True, False, False], impl)
    torch.library.opcheck(fwd, args)
    ys, ts, zs = fwd(*args)
    needs = [True, *(layer[name] is not None for layer in full for name in TRAINED)]
    kept = ([*ts[:2], None], [None, zs[1], None])
    torch.library.opcheck(bwd, (ys, x.detach(), *lists, *kept, needs, impl))


def test_compiles_in_one_graph():
    x, layers = make(LAYERS, "fp32")
    compiled = torch.compile(decomposed_linears, fullgraph=True, backend="aot_eager")
    found = outcome(compiled(x, layers), x, layers)
    for name, value in outcome(decomposed_linears(x, layers), x, layers).items():
        torch.testing.assert_close(found[name], value)


def test_autocast():
    x, layers = make(QKV, "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        ys, expected = decomposed_linears(x, layers), separately(x, layers)
    found, exact = outcome(ys, x, layers), exactly(x, layers)
    for name, value in outcome(expected, x, layers).items():
        assert found[name].dtype == value.dtype, name
        checks.assert_as_good_as(found[name], value, exact[name], name, torch.bfloat16)


def test_a_second_derivative_is_refused():
    x, layers = make(QKV, "fp32")
    (d_x,) = torch.autograd.grad(
        sum(y.sum() for y in decomposed_linears(x, layers)), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice a function of decomp_kernels"):
        d_x.sum().backward()


def test_what_does_not_fit_is_named():
    x, layers = make(QKV, "fp32")
    with pytest.raises(TypeError, match=r"layers\[1\] has 'rank', which is no argument of a layer"):
        decomposed_linears(x, [layers[0], {"weight": layers[1]["weight"], "rank": 3}])
    with pytest.raises(TypeError, match=r"layers\[0\] must have a weight, got bias"):
        decomposed_linears(x, [{"bias": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"layers\[2\]: down must have shape"):
        decomposed_linears(x, [*layers[:2], layers[2] | {"down": torch.ones(3, 7)}])
    with pytest.raises(TypeError, match=r"layers\[0\]: x must be floating point"):
        decomposed_linears(x.long(), layers)
    with pytest.raises(ValueError, match="impl must be one of"):
        decomposed_linears(x, layers, impl="fast")


def test_it_is_public_and_follows_the_environment(monkeypatch):
    assert dk.decomposed_linears is decomposed_linears
    x, layers = make(QKV, "fp64")
    monkeypatch.setenv(dispatch.VARIABLE, "triton:passes")
    with pytest.raises(RuntimeError, match="x is float64"):
        decomposed_linears(x, layers)


@pytest.mark.parametrize("mutant", planted.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not triton_mutants.survives(mutant, planted.run)
