"""The operator: every term, dtype, shape and implementation against the formula in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.ops.decomposed_linear import bwd, decomposed_linear, fwd
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

IMPLS = ("reference", "aten")
NAMES = ("x", "weight", "bias", "down", "up", "core", "in_scale", "out_scale", "addend")
OPTIONAL = ("bias", "branch", "core", "in_scale", "out_scale", "addend")
PHI = {
    "identity": lambda t: t,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
impls = pytest.mark.parametrize("impl", IMPLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def formula(t, scale, activation, kept=None):
    """The definition in plain PyTorch, differentiated by autograd; dtypes are the tensors' own."""
    X = t["x"] if "in_scale" not in t else (t["x"] * t["in_scale"]).to(t["x"].dtype)
    z = X @ t["weight"].T
    if "down" in t:
        dropped = X if kept is None else X * kept
        h = PHI[activation](dropped.to(t["down"].dtype) @ t["down"].T)
        h = h if "core" not in t else (h * t["core"]).to(h.dtype)
        z = (z + scale * (h @ t["up"].T)).to(z.dtype)
    z = z if "addend" not in t else z + t["addend"]
    y = z if "out_scale" not in t else z * t["out_scale"]
    y = y if "bias" not in t else y + t["bias"]
    return y.to(t["x"].dtype)


def make(terms, dtype, shape=(3, 5), K=12, N=9, r=4, seed=0):
    base, adapter = DTYPES[dtype]
    wide = torch.promote_types(base, torch.float32)
    gen = torch.Generator().manual_seed(seed)
    sizes = {
        "x": ((*shape, K), base),
        "weight": ((N, K), base),
        "bias": ((N,), base),
        "down": ((r, K), adapter),
        "up": ((N, r), adapter),
        "core": ((r,), wide),
        "in_scale": ((K,), wide),
        "out_scale": ((N,), wide),
        "addend": ((*shape, N), base),
    }
    wanted = {"x", "weight", *terms} | ({"down", "up"} if "branch" in terms else set())
    return {
        name: _drawn(size, gen).to(kind).requires_grad_()
        for name, (size, kind) in sizes.items()
        if name in wanted
    }


def _drawn(size, generator):
    made = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    return made.to(torch.get_default_device())


def outcome(fn, tensors, dy):
    y = fn(tensors)
    return dict(zip(("y", *tensors), (y, *torch.autograd.grad(y, list(tensors.values()), dy))))


def check_against_formula(tensors, impl, scale=0.7, activation="identity", **options):
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    y_shape = (*tensors["x"].shape[:-1], tensors["weight"].shape[0])
    dy = _drawn(y_shape, torch.Generator().manual_seed(9)).to(tensors["x"].dtype)
    kept = options.pop("kept", None)
    ours = outcome(
        lambda t: decomposed_linear(**t, scale=scale, activation=activation, impl=impl, **options),
        tensors,
        dy,
    )
    plain = formula_in(tensors, scale, activation, kept, dy)
    truth = formula_in(exact, scale, activation, kept, dy.double())
    for name, value in ours.items():
        if value.dtype == torch.float64:
            assert relative_error(value, truth[name]) < 1e-13, name
        else:
            assert_as_good_as(value, plain[name], truth[name], name, tensors["x"].dtype)


def formula_in(tensors, scale, activation, kept, dy):
    kept = None if kept is None else kept.to(tensors["x"].dtype)
    return outcome(lambda t: formula(t, scale, activation, kept), tensors, dy)


def term_sets():
    for chosen in itertools.product((False, True), repeat=len(OPTIONAL)):
        terms = [name for name, wanted in zip(OPTIONAL, chosen, strict=True) if wanted]
        if "core" not in terms or "branch" in terms:
            yield terms


@impls
@dtypes
def test_every_combination_of_terms(dtype, impl):
    for terms in term_sets():
        check_against_formula(make(terms, dtype), impl)


@impls
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, impl):
    check_against_formula(make(OPTIONAL, dtype), impl, activation=activation)


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("r", [1, 3, 16, 40])
@pytest.mark.parametrize("shape", [(1,), (), (2, 1, 7), (130,)], ids=str)
def test_odd_shapes_and_ranks(shape, r, dtype, impl):
    check_against_formula(make(OPTIONAL, dtype, shape, K=67, N=45, r=r), impl)


@given(
    M=st.integers(0, 33),
    K=st.integers(1, 40),
    N=st.integers(1, 40),
    r=st.integers(1, 20),
    terms=st.sets(st.sampled_from(OPTIONAL)),
    dtype=st.sampled_from(["fp64", "fp32", "bf16-fp32"]),
    impl=st.sampled_from(IMPLS),
)
def test_any_shape(M, K, N, r, terms, dtype, impl):
    terms = terms | ({"branch"} if "core" in terms else set())
    check_against_formula(make(terms, dtype, (M,), K, N, r), impl)


@impls
@dtypes
@pytest.mark.parametrize("terms", [["branch"], OPTIONAL], ids=["lora", "all"])
def test_dropout_is_the_defined_mask_on_the_branch(terms, dtype, impl):
    tensors = make(terms, dtype, (6, 7), K=33)
    seed, p = torch.tensor(-987654321), 0.3
    kept = keep_mask(seed, (42, 33), p).view(6, 7, 33).double() / kept_fraction(p)
    check_against_formula(tensors, impl, dropout=p, seed=seed, kept=kept)


@impls
def test_dropout_over_several_blocks(impl, monkeypatch):
    from decomp_kernels.kernels import gemm, mask

    monkeypatch.setattr(mask, "BLOCK_ELEMENTS", 100)
    whole = gemm.row_blocks
    monkeypatch.setattr(gemm, "row_blocks", lambda of, e=100, k=None: whole(of, min(e, 100), k))
    for dtype in ("fp32", "bf16-fp32"):
        tensors = make(OPTIONAL, dtype, (50,), K=33)
        seed, p = torch.tensor(77), 0.4
        kept = keep_mask(seed, (50, 33), p).double() / kept_fraction(p)
        check_against_formula(tensors, impl, dropout=p, seed=seed, kept=kept)


@impls
def test_hand_written_backward_passes_gradcheck(impl):
    for activation in ("identity", "gelu"):
        tensors = make(OPTIONAL, "fp64", (3,), K=5, N=4, r=2)

        def call(*values, names=tuple(tensors), activation=activation):
            given = dict(zip(names, values, strict=True))
            return decomposed_linear(
                **given, scale=0.7, activation=activation, impl=impl, dropout=0.4,
                seed=torch.tensor(3),
            )  # fmt: skip

        assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@impls
def test_only_what_is_asked_for_is_computed(impl):
    for asked in (["x"], ["up"], ["down", "core"], ["out_scale"], ["in_scale"], ["bias", "x"]):
        tensors = make(OPTIONAL, "fp64")
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in asked)
        decomposed_linear(**tensors, scale=0.7, impl=impl).sum().backward()
        exact = {k: v.detach().clone().requires_grad_(k in asked) for k, v in tensors.items()}
        formula(exact, 0.7, "identity").sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == (name in asked), name
            if name in asked:
                assert relative_error(tensor.grad, exact[name].grad) < 1e-13, name


def test_same_inputs_same_bits():
    tensors = make(OPTIONAL, "bf16-fp32", (65,), K=200, N=150)
    seed = torch.tensor(5)
    dy = torch.randn(65, 150).bfloat16()

    def call(t):
        return decomposed_linear(**t, dropout=0.1, seed=seed)

    first, second = outcome(call, tensors, dy), outcome(call, tensors, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layouts_that_gemms_do_not_like():
    tensors = make(["bias", "branch", "in_scale", "out_scale"], "fp32", (8,), K=16, N=8)
    with torch.no_grad():
        tensors["x"] = torch.randn(16, 8).T.requires_grad_()
        tensors["weight"] = torch.randn(16, 8).T.requires_grad_()
    truth = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    decomposed_linear(**tensors).sum().backward()  # a stride-0 gradient
    formula(truth, 1.0, "identity").sum().backward()
    for name in tensors:
        assert relative_error(tensors[name].grad, truth[name].grad) < 1e-5, name


def test_the_output_may_be_changed_in_place():
    tensors = make(["bias", "branch", "out_scale"], "fp64")
    exact = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    with torch.no_grad():
        tensors["out_scale"][2] = exact["out_scale"][2] = 0.0
    y = decomposed_linear(**tensors)
    F.relu(y, inplace=True).sum().backward()
    F.relu(formula(exact, 1.0, "identity")).sum().backward()
    for name in tensors:
        assert relative_error(tensors[name].grad, exact[name].grad) < 1e-13, name


def test_save_output_takes_the_gradient_from_y():
    tensors = make(["branch", "out_scale"], "fp64")
    exact = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    decomposed_linear(**tensors, save_output=True).square().sum().backward()
    formula(exact, 1.0, "identity").square().sum().backward()
    for name in tensors:
        assert relative_error(tensors[name].grad, exact[name].grad) < 1e-12, name
    with pytest.raises(ValueError, match="save_output=True needs a layer without bias"):
        decomposed_linear(**make(["bias", "out_scale"], "fp32"), save_output=True)


def test_second_order_gradients_are_refused():
    tensors = make(["branch"], "fp64")
    y = decomposed_linear(**tensors)
    (d_x,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
        d_x.sum().backward()


@impls
@pytest.mark.parametrize("dtype", ["fp32", "bf16-fp32"])
@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_registration(layout, dtype, impl):
    for terms in ([], ["branch", "bias"], OPTIONAL):
        t = {k: v.detach() for k, v in make(terms, dtype).items()}
        if layout == "column-major":  # as a triangular solve returns its result
            t = {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in t.items()}
        options = (torch.tensor(3), 0.5, 0.25, "gelu")
        keep = ["branch" in terms, "out_scale" in terms]
        shared = (t["weight"], None, "dense", *(t.get(n) for n in NAMES[2:8]))
        torch.library.opcheck(fwd, (t["x"], *shared, t.get("addend"), *options, keep, impl))
        y, h, z = fwd(t["x"], *shared, t.get("addend"), *options, keep, impl)
        needs = [name in t and name != "addend" for name in NAMES]
        h, z = (h if keep[0] else None), (z if keep[1] else None)
        torch.library.opcheck(bwd, (y, t["x"], *shared, h, z, *options, needs, impl))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_a_graph_break(dropout):
    tensors = make(["bias", "branch", "core", "out_scale"], "fp32")
    seed = torch.tensor(11)

    def call(t):
        return decomposed_linear(**t, scale=0.5, dropout=dropout, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dy = torch.randn(3, 5, 9)
    for ours, eager in zip(
        outcome(compiled, tensors, dy).values(), outcome(call, tensors, dy).values(), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_autocast_computes_what_a_linear_would():
    linear = nn.Linear(12, 9)
    x = torch.randn(4, 12, requires_grad=True)
    down, up = torch.randn(3, 12, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = linear(x)
        y = decomposed_linear(x, linear.weight, linear.bias, down=down, up=up)
        base = decomposed_linear(x, linear.weight, linear.bias)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(base, plain)
    y.float().sum().backward()
    assert x.grad.dtype == down.grad.dtype == torch.float32


def test_bad_calls_say_what_is_wrong():
    good = {k: v.detach() for k, v in make(OPTIONAL, "fp32").items()}

    def refused(error, message, **changed):
        with pytest.raises(error, match=message):
            decomposed_linear(**{**good, **changed})

    refused(ValueError, r"x must end in the weight's K = 12 columns, got shape \(4, 13\)",
            x=torch.randn(4, 13))  # fmt: skip
    refused(ValueError, r"down must have shape \(4, 12\), got \(4, 11\)", down=torch.randn(4, 11))
    refused(ValueError, r"up must have shape \(9, 4\), got \(9, 5\)", up=torch.randn(9, 5))
    refused(ValueError, r"core must have shape \(4,\), got \(3,\)", core=torch.randn(3))
    refused(ValueError, r"addend must have shape \(3, 5, 9\)", addend=torch.randn(15, 9))
    refused(ValueError, "down and up come together", up=None)
    refused(ValueError, "core scales the low-rank branch", down=None, up=None)
    refused(TypeError, "one dtype, got torch.float16 and torch.float32", x=good["x"].half())
    refused(TypeError, "must be torch.float32 as x is, or float32, got torch.bfloat16",
            down=good["down"].bfloat16(), up=good["up"].bfloat16())  # fmt: skip
    refused(ValueError, "out_scale must be on x's device cpu, got meta",
            out_scale=torch.empty(9, device="meta"))  # fmt: skip
    refused(ValueError, "activation must be one of identity, relu", activation="swish")
    refused(ValueError, "dropout must be at least 0 and below 1, got 1.0", dropout=1.0)
    refused(ValueError, "impl must be one of auto, reference, aten", impl="cuda")
    refused(TypeError, "x must be floating point", x=torch.ones(4, 12, dtype=torch.int64))


@impls
def test_operators_keep_their_precision_inside_autocast(impl):
    """A backward that is run under autocast, and float64, which autocast leaves alone."""
    tensors = make(OPTIONAL, "bf16-fp32")
    dy = torch.randn(3, 5, 9).bfloat16()
    y = decomposed_linear(**tensors, impl=impl)
    plain = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, list(tensors.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    wide = make(OPTIONAL, "fp64")
    with torch.autocast("cpu", torch.bfloat16):
        y = decomposed_linear(**wide, impl=impl)
    assert relative_error(y, formula(wide, 1.0, "identity")) < 1e-13


@impls
def test_a_seed_must_be_an_int64_scalar_there(impl):
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    branch = {"down": torch.randn(2, 6), "up": torch.randn(5, 2), "dropout": 0.5, "impl": impl}
    for seed in (5, torch.tensor(5.0), torch.tensor(5, dtype=torch.int32)):
        with pytest.raises(TypeError, match="seed must be an int64 tensor such as"):
            decomposed_linear(x, w, **branch, seed=seed)
    for seed in (torch.tensor([5]), torch.empty(0, dtype=torch.int64), torch.tensor(5).to("meta")):
        with pytest.raises(ValueError, match="seed must be a scalar on x's device cpu"):
            decomposed_linear(x, w, **branch, seed=seed)


@impls
@pytest.mark.parametrize("bias", [False, True])
def test_a_column_major_addend_leaves_y_row_major(bias, impl):
    x, w = torch.randn(20, 24), torch.randn(18, 24)
    addend, b = torch.randn(18, 20).T, torch.randn(18) if bias else None
    y = decomposed_linear(x, w, b, addend=addend, impl=impl)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b) + addend)
