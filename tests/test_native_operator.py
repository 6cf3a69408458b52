"""The operator through the native library against float64; where it is refused; levels; safety."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_places import built, dtypes
from test_decomposed_linear import (
    NAMES,
    OPTIONAL,
    check_against_formula,
    formula,
    make,
    outcome,
    term_sets,
)
from torch import nn

import decomp_kernels as dk
from decomp_kernels import dispatch, native_library
from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.ops.decomposed_linear import bwd, decomposed_linear, fwd
from decomp_kernels.ops.dequantize import dequantize
from decomp_kernels.ops.merged_weight import merged_weight
from decomp_kernels.ops.row_norm import bwd as norm_bwd
from decomp_kernels.ops.row_norm import fwd as norm_fwd
from decomp_kernels.ops.row_norm import row_norm, squared_rows
from decomp_kernels.reference import decomposed_linear as reference
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

pytestmark = built


def test_every_combination_of_terms(place):
    for dtype in dtypes(*place):
        for terms in term_sets():
            check_against_formula(make(terms, dtype), place[1])


def test_every_level_of_the_processor(level):
    for dtype in dtypes("cpu", "native:passes"):
        for terms in (["branch"], OPTIONAL):
            check_against_formula(make(terms, dtype, (6, 7), K=67, N=45, r=5), "native:passes")
    assert native_library.cpu_level() == level
    assert dispatch.architecture(torch.device("cpu")).removesuffix("+amx") == level


def test_a_level_that_is_not_there_is_refused():
    with pytest.raises(
        RuntimeError, match="the level must be generic, avx2, avx512 or avx512_bf16"
    ):
        native_library.set_cpu_level("mmx")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(place, activation):
    for dtype in dtypes(*place):
        check_against_formula(make(OPTIONAL, dtype), place[1], activation=activation)


@pytest.mark.parametrize("r", [1, 3, 24, 200])
@pytest.mark.parametrize("shape", [(1,), (), (2, 1, 7), (0,), (70,)], ids=str)
def test_odd_shapes_and_ranks(place, shape, r):
    for dtype in dtypes(*place):
        check_against_formula(make(OPTIONAL, dtype, shape, K=67, N=45, r=r), place[1])


@given(
    M=st.integers(0, 70), K=st.integers(1, 150), N=st.integers(1, 150), r=st.integers(1, 70),
    terms=st.sampled_from(list(term_sets())), dtype=st.sampled_from(["fp32", "bf16", "bf16-fp32"]),
    dropout=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_any_shape(M, K, N, r, terms, dtype, dropout):
    tensors, options = make(terms, dtype, (M,), K, N, r), {}
    if dropout and "branch" in terms:
        seed = torch.tensor(M * 1000 + K)
        kept = keep_mask(seed, (M, K), dropout).double() / kept_fraction(dropout)
        options = {"dropout": dropout, "seed": seed, "kept": kept}
    check_against_formula(tensors, "native:passes", **options)


@pytest.mark.parametrize("terms", [["branch"], OPTIONAL], ids=["lora", "all"])
def test_dropout_is_the_defined_mask_on_the_branch(place, terms):
    for dtype in dtypes(*place):
        for K in (33, 36):
            tensors = make(terms, dtype, (6, 7), K=K)
            seed, p = torch.tensor(-987654321), 0.3
            kept = keep_mask(seed, (42, K), p).view(6, 7, K).double() / kept_fraction(p)
            check_against_formula(tensors, place[1], dropout=p, seed=seed, kept=kept)


def test_only_what_is_asked_for_is_computed(place):
    dtype = "bf16" if place[1] == "native:fused" else "fp32"
    for asked in (["x"], ["up"], ["down", "core"], ["out_scale"], ["in_scale"], ["bias", "x"]):
        tensors = make(OPTIONAL, dtype)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in asked)
        decomposed_linear(**tensors, scale=0.7, impl=place[1]).sum().backward()
        exact = {k: v.detach().double().requires_grad_(k in asked) for k, v in tensors.items()}
        formula(exact, 0.7, "identity").sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == (name in asked), name
            if name in asked:
                most = 2e-6 if dtype == "fp32" else 2e-2
                assert relative_error(tensor.grad, exact[name].grad) < most, name


def test_same_inputs_same_bits_whatever_the_threads(place):
    tensors = make(OPTIONAL, dtypes(*place)[-1], (65,), K=200, N=150)
    seed = torch.tensor(5)
    dy = torch.randn(65, 150).to(tensors["x"].dtype)
    found = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        made = outcome(
            lambda t: decomposed_linear(**t, dropout=0.1, seed=seed, impl=place[1]), tensors, dy
        )
        found.append(made if threads == 1 else {k: made[k] for k in ("down", "up")})
    torch.set_num_threads(1)
    for other in found[1:]:
        for name, value in other.items():
            # z, of which d_out_scale is made, is the library's GEMM; so is dx.
            assert torch.equal(value, found[0][name]), name


def test_float32_adapters_on_a_bf16_base_keep_float32_precision():
    tensors = make(["branch"], "bf16-fp32", (40,), K=64, N=48, r=8)
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    dy = torch.randn(40, 48).bfloat16()
    ours = outcome(lambda t: decomposed_linear(**t, scale=0.7, impl="native:passes"), tensors, dy)
    truth = outcome(lambda t: formula(t, 0.7, "identity"), exact, dy.double())
    for name in ("down", "up"):
        assert relative_error(ours[name], truth[name]) < 2e-6, name


def test_registration(place):
    for terms in ([], OPTIONAL):
        dtype = dtypes(*place)[-1]
        t = {k: v.detach() for k, v in make(terms, dtype).items()}
        options = (torch.tensor(3), 0.5, 0.25, "gelu")
        keep = ["branch" in terms, "out_scale" in terms]
        shared = (t["weight"], None, "dense", *(t.get(n) for n in NAMES[2:8]))
        args = (t["x"], *shared, t.get("addend"), *options, keep, place[1])
        torch.library.opcheck(fwd, args)
        y, h, z = fwd(*args)
        needs = [name in t for name in NAMES]
        needs[-1] = "out_scale" in t and "addend" in t
        given = (h if keep[0] else None, z if keep[1] else None)
        torch.library.opcheck(bwd, (y, t["x"], *shared, *given, *options, needs, place[1]))
    weight, down, up = torch.randn(9, 12).bfloat16(), torch.randn(3, 12), torch.randn(9, 3)
    squared = squared_rows(weight)
    torch.library.opcheck(norm_fwd, (weight, squared, down, up, 0.7, "native:passes"))
    norm = norm_fwd(weight, squared, down, up, 0.7, "native:passes")
    torch.library.opcheck(norm_bwd, (norm, norm, weight, down, up, 0.7, "native:passes"))


def test_row_norm_differentiates(place):
    weight = torch.randn(37, 53)
    down, up = torch.randn(5, 53, requires_grad=True), torch.randn(37, 5, requires_grad=True)
    found = {}
    for impl in ("aten", "native:passes"):
        norm = row_norm(weight, down, up, 0.7, impl=impl)
        found[impl] = (norm, *torch.autograd.grad(norm.sum(), (down, up)))
    for one, other in zip(found["aten"], found["native:passes"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    start = row_norm(weight, down, torch.zeros_like(up), 0.7, impl="native:passes")
    torch.testing.assert_close(start, squared_rows(weight).sqrt(), rtol=1.2e-7, atol=0)


def test_dora_starts_as_the_linear(place):
    linear = nn.Linear(53, 37, bias=False)
    if place[1] == "native:fused":
        linear = linear.bfloat16()
    layer = dk.DecomposedLinear(linear, dk.DoRA(r=4, impl=place[1]))
    assert torch.equal(
        layer.adapters["default"].magnitude,
        row_norm(
            linear.weight,
            *(layer.adapters["default"].get_parameter(n) for n in ("down", "up")),
            impl=place[1],
        ),
    )


def test_merged_weights_are_the_definition(place):
    """With and without each term, in every dtype of the place."""
    for dtype in dtypes(*place):
        t = {k: v.detach() for k, v in make(OPTIONAL, dtype, N=45, K=67, r=5).items()}
        given = [t[n] for n in ("down", "up", "core", "in_scale", "out_scale")]
        for some in (given, [*given[:2], None, None, None], [None, None, None, *given[3:]]):
            ours = merged_weight(t["weight"], *some, 0.7, place[1])
            exact = [None if one is None else one.double() for one in some]
            truth = reference.merged_weight(t["weight"].double(), *exact, 0.7)
            plain = reference.merged_weight(t["weight"], *some, 0.7)
            assert ours.dtype == t["weight"].dtype
            assert_as_good_as(ours, plain, truth, dtype, t["weight"].dtype)


def test_quantised_weights_become_dense(place):
    for dtype in (torch.float32, torch.bfloat16):
        codes = torch.randint(0, 256, (-(-37 * 53 // 2),), dtype=torch.uint8)
        absmax = torch.rand(-(-37 * 53 // 64)) + 0.1
        rows = torch.randint(-128, 128, (37, 53), dtype=torch.int8)
        for weight, scale, kind in ((codes, absmax, "nf4"), (rows, absmax[:1].expand(37), "int8")):
            given = (weight, scale.contiguous(), kind)
            made = {
                impl: dequantize(*given, shape=(37, 53), dtype=dtype, impl=impl)
                for impl in ("reference", "aten", place[1])
            }
            assert torch.equal(made[place[1]], made["reference"])
            assert torch.equal(made["aten"], made["reference"])


@pytest.mark.parametrize("name", sorted(dk.methods()))
def test_a_layer_trains_through_it(name):
    """Every method that has the form; the others refuse it by name."""
    method = dk.methods()[name]
    if "native:passes" not in method.impls:
        with pytest.raises(ValueError, match="has no native:passes form: impl must be one of auto"):
            method(impl="native:passes")
        return
    linear, x = nn.Linear(20, 14), torch.randn(9, 20)
    grads, outputs = [], []
    for each in ("aten", "native:passes"):
        torch.manual_seed(1)
        layer = dk.DecomposedLinear(linear, replace(method.small(), impl=each))
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        y = layer(x)
        y.square().sum().backward()
        outputs.append(y)
        grads.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert_as_good_as(outputs[1], outputs[0], outputs[0], name)
    assert grads[0]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_compiles_without_a_graph_break(place):
    t = {k: v for k, v in make(OPTIONAL, dtypes(*place)[0]).items() if k != "addend"}
    compiled = torch.compile(decomposed_linear, fullgraph=True, backend="aot_eager")
    found = [
        outcome(
            lambda t, run=run: run(**t, scale=0.7, impl=place[1]), t, torch.ones(3, 5, 9).to(t["x"])
        )
        for run in (decomposed_linear, compiled)
    ]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_the_environment_variable_chooses_it(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "native:passes")
    assert dispatch.choose(torch.ones(1), has=dispatch.IMPLS) == "native:passes"


def test_where_it_cannot_run_it_says_why_and_does_not_fall_back():
    with pytest.raises(RuntimeError, match="host kernels take float32 and bfloat16, and x is fl"):
        decomposed_linear(**make(["branch"], "fp16"), impl="native:passes")
    with pytest.raises(RuntimeError, match="on the CPU the native form is native:passes"):
        decomposed_linear(**make(["branch"], "fp32"), impl="native:fused")
    with pytest.raises(RuntimeError, match="its kernels run on CPUs and CUDA devices, and x is on"):
        dispatch.choose(torch.ones(1, device="meta"), "native:passes", has=dispatch.IMPLS)


def test_without_a_library_auto_is_library_calls(monkeypatch):
    monkeypatch.setattr(native_library, "why_not_loaded", lambda: "the native library is missing")
    monkeypatch.setattr(native_library, "cpu_architecture", lambda: None)
    assert dispatch.architecture(torch.device("cpu")) == dispatch.ANY
    choice = dispatch.decide("auto", dispatch.IMPLS, dispatch.ANY, None, lambda form: None)
    assert choice.impl == "aten"
    assert choice.why == "library calls: the native library is missing"
    with pytest.raises(RuntimeError, match="cannot run: the native library is missing; use"):
        decomposed_linear(**make(["branch"], "fp32"), impl="native:passes")


@pytest.mark.parametrize(
    ("archs", "served"),
    [
        ([], ()),
        (["80"], ((8, 0), (8, 6), (8, 9))),
        (["90a"], ((9, 0),)),
        (["80+PTX"], ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))),
        (["80", "90a", "100a"], ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))),
    ],
    ids=str,
)
def test_which_gpus_a_build_serves(monkeypatch, archs, served):
    """Binary code runs on its major version from its minor on, "a" code on its GPU, PTX upwards."""
    monkeypatch.setattr(native_library, "record", lambda: {"cuda_archs": archs})
    for gpu in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        why = native_library.why_not_on_gpu(gpu)
        assert (why is None) == (gpu in served), gpu
        assert why is None or "not built" in why or f"sm_{gpu[0]}{gpu[1]}" in why
