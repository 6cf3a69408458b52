"""The compiled autograd node (csrc/autograd): its forms' bits, and what it leaves alone."""

import itertools
import json
import re

import pytest
import torch
from torch import nn
from torch.testing._internal.logging_tensor import LoggingTensorMode, capture_logs
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import decomp_kernels as dk
from decomp_kernels import dispatch, native_library
from decomp_kernels.bench.engine import Contender
from decomp_kernels.bench.memory import peak_bytes
from decomp_kernels.methods.base import METHODS

pytestmark = pytest.mark.skipif(
    native_library.why_not_autograd() is not None, reason=str(native_library.why_not_autograd())
)
K, N, R = 24, 40, 4
TERMS = ("bias", "low_rank", "core", "in_scale", "out_scale")
SETS = [
    terms
    for count in range(len(TERMS) + 1)
    for terms in itertools.combinations(TERMS, count)
    if "core" not in terms or "low_rank" in terms
]


def compiled(y):
    return type(y.grad_fn).__name__ == "CppFunction"


def case(terms, dtype, lead=(5,), adapter=None):
    """x, weight, and the named factors; down and up have the dtype ``adapter``, if given."""
    torch.manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = {"bias": (N,), "down": (R, K), "up": (N, R), "core": (R,), "in_scale": (K,),
              "out_scale": (N,)}  # fmt: skip
    named = [name for term in terms for name in (("down", "up") if term == "low_rank" else (term,))]
    kinds = {"bias": dtype, "down": adapter or dtype, "up": adapter or dtype}
    made = {
        name: torch.randn(shapes[name], dtype=kinds.get(name, wide)).requires_grad_()
        for name in named
    }
    x = torch.randn(*lead, K, dtype=dtype).requires_grad_()
    return x, torch.randn(N, K, dtype=dtype), made


def step(x, weight, factors, lacking=(), **options):
    """The output, its node's kind, and the gradients of everything not in ``lacking``."""
    leaves = {"x": x, **factors}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in lacking)
    y = dk.decomposed_linear(x, weight, scale=1.7, **factors, **options)
    wanted = [leaf for name, leaf in leaves.items() if name not in lacking]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return y, [y.detach(), *(torch.autograd.grad(y, wanted, dy) if wanted else ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("terms", SETS, ids="-".join)
def test_the_bits_are_those_of_library_calls(terms, dtype, monkeypatch):
    for lead in ((5,), (2, 3), (0,)):
        x, weight, factors = case(terms, dtype, lead)
        for lacking in ((), ("x",), ("down", "in_scale"), ("up", "core"), ("bias", "out_scale")):
            y, found = step(x, weight, factors, lacking)
            monkeypatch.setattr(native_library, "autograd_node", lambda: None)
            plain, expected = step(x, weight, factors, lacking)
            monkeypatch.undo()
            assert compiled(y) or not y.requires_grad
            assert not compiled(plain)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
                assert torch.equal(ours, theirs)


NO_HOST_KERNELS = native_library.why_not_loaded() is not None
host_kernels = pytest.mark.skipif(NO_HOST_KERNELS, reason=str(native_library.why_not_loaded()))
LACKING = [
    (),
    ("x",),
    ("x", "in_scale"),
    ("down", "in_scale"),
    ("up", "core"),
    ("bias", "out_scale"),
]


@host_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kinds", [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
@pytest.mark.parametrize("terms", SETS, ids="-".join)
def test_the_bits_are_those_of_the_passes(terms, kinds, dropout, monkeypatch):
    dtype, adapter = (kind and getattr(torch, kind) for kind in kinds)
    options = {"dropout": dropout, "seed": torch.tensor(5), "impl": "native:passes"}
    for lead in ((5,), (2, 3), (0,)):
        x, weight, factors = case(terms, dtype, lead, adapter)
        for lacking in LACKING:
            y, found = step(x, weight, factors, lacking, **options)
            monkeypatch.setattr(native_library, "autograd_node", lambda: None)
            plain, expected = step(x, weight, factors, lacking, **options)
            monkeypatch.undo()
            assert compiled(y) or not y.requires_grad
            assert not compiled(plain)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
                assert torch.equal(ours, theirs)


@host_kernels
@pytest.mark.parametrize("native", ["forward", "backward"])
def test_each_way_by_what_the_table_has_for_it(native, monkeypatch):
    """Bits of both forms: y is of the forward's, gradients of the backward's."""
    forms = {native: "native:passes"}

    def table(arch, work):
        return dispatch.Choice(forms.get(work.direction, "aten"), "measured")

    monkeypatch.setattr(dispatch, "measured_choice", table)
    x, weight, factors = case(("low_rank", "core", "out_scale"), torch.bfloat16, (40,))
    y, found = step(x, weight, factors)
    assert compiled(y)
    with monkeypatch.context() as patch:
        patch.setattr(native_library, "autograd_node", lambda: None)
        assert all(map(torch.equal, found, step(x, weight, factors)[1]))
    for impl in ("aten", "native:passes"):  # else the comparison says nothing
        assert not all(map(torch.equal, found, step(x, weight, factors, impl=impl)[1]))


def test_rows_that_do_not_lie_in_order(monkeypatch):
    _, weight, factors = case(("low_rank", "in_scale"), torch.float32, (6,))
    turned = torch.randn(K, 6).T.requires_grad_()
    y, found = step(turned, weight, factors)
    monkeypatch.setattr(native_library, "autograd_node", lambda: None)
    assert all(map(torch.equal, found, step(turned, weight, factors)[1]))
    assert compiled(y)


@pytest.mark.parametrize("name", ["lora", "ia3", "ssb", "vera", "bitfit", "pissa"])
def test_plain_methods_take_it(name):
    layer = dk.DecomposedLinear(nn.Linear(K, N), METHODS[name].small())
    assert compiled(layer(torch.randn(3, K)))


class Watched(torch.Tensor):
    """A subclass, which may mean anything."""


@pytest.mark.parametrize(
    "other",
    [
        "dropout", "activation", "addend", "float32 adapters", "trained weight", "autocast",
        "subclass", "reference", "variable", "table", "half by table",
    ],
)  # fmt: skip
def test_everything_else_stays_in_python(other, monkeypatch):
    """Dropout and float32 adapters: unless both directions are native."""
    dtype = torch.bfloat16 if other in ("float32 adapters", "half by table") else torch.float32
    x, weight, factors = case(("low_rank",), dtype)
    options = {}
    if other == "dropout":
        options |= {"dropout": 0.5, "impl": "aten"}
    if other == "activation":
        options["activation"] = "relu"
    if other == "addend":
        options["addend"] = torch.randn(5, N)
    if other in ("float32 adapters", "half by table"):
        factors = {name: factor.detach().float() for name, factor in factors.items()}
    if other == "float32 adapters":
        options["impl"] = "aten"
    if other == "trained weight":
        weight.requires_grad_()
    if other == "subclass":
        x = x.detach().as_subclass(Watched).requires_grad_()
    if other == "reference":
        options["impl"] = "reference"
    if other == "variable":
        monkeypatch.setenv(dispatch.VARIABLE, "reference")
    if other in ("table", "half by table"):
        if NO_HOST_KERNELS:
            pytest.skip("no table without the native library")
        forms = {"table": "triton:passes", "half by table": "native:passes"}

        def table(arch, work):
            forward = work.direction == "forward"
            return dispatch.Choice("aten" if forward and other != "table" else forms[other], "")

        monkeypatch.setattr(dispatch, "measured_choice", table)
        monkeypatch.setattr(dispatch, "why_not_triton", lambda x: None)
    with torch.autocast("cpu", enabled=other == "autocast"):
        assert not compiled(dk.decomposed_linear(x, weight, **factors, **options))


def test_library_calls_by_name_take_it(monkeypatch):
    x, weight, factors = case(("low_rank",), torch.float32)
    assert compiled(dk.decomposed_linear(x, weight, **factors, impl="aten"))
    monkeypatch.setenv(dispatch.VARIABLE, "aten")
    assert compiled(dk.decomposed_linear(x, weight, **factors))


def test_it_keeps_what_the_gradients_asked_for_need():
    x, weight, factors = case(("low_rank", "out_scale"), torch.float32)

    def kept(**trained):
        shapes = []
        for name, factor in factors.items():
            factor.requires_grad_(trained.get(name, False))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, id):
            dk.decomposed_linear(x, weight, **factors)
        own = {weight.shape, *(factor.shape for factor in factors.values())}
        return sorted(tuple(shape) for shape in shapes if shape not in own)

    assert kept() == []
    assert kept(down=True) == [(5, K)]
    assert kept(up=True) == [(5, R)]
    assert kept(out_scale=True) == [(5, N)]


@pytest.mark.parametrize("lacking", [(), ("down", "up"), ("x",)], ids=str)
def test_its_peak_is_that_of_library_calls(lacking, monkeypatch):
    x, weight, factors = case(("low_rank",), torch.float32, (64,))
    for name, leaf in (("x", x), *factors.items()):
        leaf.requires_grad_(name not in lacking)

    def reset():
        for leaf in (x, *factors.values()):
            leaf.grad = None

    def peak():
        def forward():
            return dk.decomposed_linear(x, weight, scale=1.7, **factors)

        def backward(y):
            y.sum().backward()

        return peak_bytes(Contender("", forward, backward, reset), x.device)

    ours = peak()
    monkeypatch.setattr(native_library, "autograd_node", lambda: None)
    assert 0 < ours <= peak()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", ["aten", pytest.param("native:passes", marks=host_kernels)])
def test_checkpointing(reentrant, form):
    x, weight, factors = case(("low_rank", "in_scale", "out_scale"), torch.float32)
    leaves = [x, *factors.values()]
    options = {"dropout": 0.3, "seed": torch.tensor(5)} if form == "native:passes" else {}

    def call(x):
        y = dk.decomposed_linear(x, weight, impl=form, **factors, **options)
        assert compiled(y) or not torch.is_grad_enabled()
        return y

    plain = torch.autograd.grad(call(x).square().sum(), leaves)
    checkpoint(call, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, plain, strict=True))


def test_what_watches_library_calls_is_shown_the_products(monkeypatch):
    def products(terms):
        x, weight, factors = case(terms, torch.float32)
        with LoggingTensorMode(), capture_logs() as lines:
            dk.decomposed_linear(x, weight, **factors).sum().backward()
        return [call for line in lines for call in re.findall(r"aten\.\w*mm_?\.\w+", line)]

    sets = [(), ("bias",), ("in_scale", "out_scale"), ("bias", "low_rank")]
    seen = [products(terms) for terms in sets]
    monkeypatch.setattr(native_library, "autograd_node", lambda: None)
    assert seen == [products(terms) for terms in sets]
    assert seen[1] == ["aten.addmm.default", "aten.mm.default"]


def test_selective_checkpointing_is_never_wrong_in_silence():
    x, weight, factors = case(("low_rank", "out_scale"), torch.float32)
    products = [torch.ops.aten.mm.default]  # to be kept: the base GEMM then adds to one of them

    def call(x):
        return dk.decomposed_linear(x, weight, **factors).tanh()

    def contexts():
        return create_selective_checkpoint_contexts(products)

    y = checkpoint(call, x, use_reentrant=False, context_fn=contexts)
    with pytest.raises(RuntimeError, match="has been mutated"):
        y.sum().backward()


def test_the_node_called_by_hand():
    x, weight, factors = case(("bias", "low_rank", "out_scale"), torch.float32)
    y = dk.decomposed_linear(x, weight, **factors)
    dy = torch.randn(y.shape)
    found = [grad for grad in y.grad_fn(dy) if grad is not None]  # in grad mode, outside the engine
    bias, down, up, out_scale = factors.values()
    expected = torch.autograd.grad(y, [x, bias, down, up, out_scale], dy)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        found[0].sum().backward()


def test_autocast_round_backward_changes_nothing():
    x, weight, factors = case(("low_rank", "out_scale"), torch.float32)
    leaves = [x, *factors.values()]
    plain = torch.autograd.grad(dk.decomposed_linear(x, weight, **factors).sum(), leaves)
    y = dk.decomposed_linear(x, weight, **factors).sum()
    with torch.autocast("cpu"):
        found = torch.autograd.grad(y, leaves)
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "is for PyTorch None"),
        ({"torch": "1.0", "autograd_bytes": 3}, "is for PyTorch 1.0"),
        ({"torch": torch.__version__, "autograd_bytes": 4}, "is not the one that was built"),
        ({"torch": torch.__version__, "autograd_bytes": 3}, "does not load"),
    ],
)
def test_a_library_of_another_pytorch_is_not_loaded(native_folder, record, says):
    assert "was not built" in native_library.why_not_autograd()
    native_library.why_not_autograd.cache_clear()
    (native_folder / native_library.AUTOGRAD).write_bytes(b"not")
    (native_folder / "build.json").write_text(json.dumps(record))
    native_library.record.cache_clear()
    assert says in native_library.why_not_autograd()
    assert native_library.autograd_node() is None
    x, weight, factors = case(("low_rank",), torch.float32)
    assert not compiled(dk.decomposed_linear(x, weight, **factors))


def test_a_library_without_the_operator_is_not_used(native_folder, monkeypatch):
    (native_folder / native_library.AUTOGRAD).write_bytes(b"not")
    (native_folder / "build.json").write_text(
        json.dumps({"torch": torch.__version__, "autograd_bytes": 3})
    )
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "decomp_kernels_autograd", object(), raising=False)
    assert "is of another version" in native_library.why_not_autograd()
    assert native_library.autograd_node() is None


def test_a_library_with_other_arguments_is_not_taken(monkeypatch):
    """One that was built from older sources."""
    kept = (native_library.why_not_autograd, native_library.autograd_node)
    with monkeypatch.context() as patch:
        for one in kept:
            one.cache_clear()
        patch.setattr(native_library, "AUTOGRAD_ARGUMENTS", native_library.AUTOGRAD_ARGUMENTS[:-1])
        assert "is of another version" in native_library.why_not_autograd()
        assert native_library.autograd_node() is None
    for one in kept:
        one.cache_clear()
    assert native_library.autograd_node() is not None


def test_what_the_node_itself_refuses():
    x, weight, factors = case(("low_rank",), torch.float32)
    node = native_library.autograd_node()
    down, up = factors["down"], factors["up"]
    for wrong, says in (
        ((x, weight.T, None, down, up), "x must be"),
        ((x, weight, None, down, None), "come together"),
        ((x, weight.requires_grad_(), None, down, up), "must be frozen"),
    ):
        with pytest.raises(RuntimeError, match=says):
            node(*wrong, None, None, None, None, 1.0, 0.0, 0)
    weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="passes must be 3 there, got 1"):
        node(x, weight, None, down, up, None, None, None, torch.tensor(5), 1.0, 0.5, 1)
    with pytest.raises(RuntimeError, match="passes must be 3 there, got 2"):
        node(x, weight, None, down.double(), up.double(), None, None, None, None, 1.0, 0.0, 2)
