"""Bad input, as a table: the error says what must be, what was got and what to do; nothing changes.

A case is a model, a call, the exception's type, and expressions that its text must all match.
"""

import errno
import os
from typing import Any, NamedTuple

import pytest
import torch
from snapshots import Snapshot
from torch import nn

import decomp_kernels as dk
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import METHODS

LAYERS = ["first", "second"]


class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20, dtype=dtype)
        self.second = nn.Linear(20, 16, bias=False, dtype=dtype)
        self.table = nn.Embedding(4, 16, dtype=dtype)
        self.head = nn.Linear(16, 6, dtype=dtype)
        self.tied = nn.Linear(16, 6, dtype=dtype)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))))


def plain():
    return Net()


def adapted(method=None, *, name="default", targets=LAYERS, **options):
    model = dk.adapt(Net(), method or dk.LoRA(r=3), targets, adapter_name=name, **options)
    with torch.no_grad():
        for number, tensor in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
            tensor.add_(0.2 * noise)
    return model


def merged(**options):
    return dk.merge(adapted(), **options)


def with_(change, make=plain):
    """What ``make`` makes, after ``change`` of it."""

    def changed():
        model = make()
        with torch.no_grad():
            change(model)
        return model

    return changed


def holding(value, layer="second"):
    def put(model):
        getattr(model, layer).weight[3, 2] = value

    return put


def adapter(model, layer="first", name="default") -> Any:
    return model.get_submodule(layer).adapters[name]


def on_meta(*layers):
    def put(model):
        for layer in layers:
            model.get_submodule(layer).to("meta")

    return put


def two_adapters():
    return dk.adapt(adapted(name="one"), dk.SSB(), ["first"], adapter_name="two")


class Case(NamedTuple):
    what: str
    make: Any
    call: Any
    error: type[Exception]
    words: list[str]


def lora(target, **options):
    """A call of adapt that is right but for the argument in question."""
    return lambda model: dk.adapt(model, dk.LoRA(r=2), target, **options)


def relu(model):
    return dk.adapt(model, dk.ParallelAdapter(r=2), ["head"])


NAMED_IN_FULL = ["first, second, head, tied"]

CASES = [
    # The method and its options
    Case("rank 0", plain, lambda m: dk.adapt(m, dk.LoRA(r=0), LAYERS), ValueError,
         ["r must be at least 1", "got 0"]),
    Case("rank -1", plain, lambda m: dk.adapt(m, dk.DoRA(r=-1), LAYERS), ValueError,
         ["r must be at least 1", "got -1"]),
    Case("rank 2.5", plain, lambda m: dk.adapt(m, dk.LoRA(r=2.5), LAYERS), TypeError,
         [r"LoRA\(r=...\) must be int", "got 2.5"]),
    Case("rank '8'", plain, lambda m: dk.adapt(m, dk.LoRA(r="8"), LAYERS), TypeError,
         [r"LoRA\(r=...\) must be int", "got '8'"]),
    Case("rank True", plain, lambda m: dk.adapt(m, dk.LoRA(r=True), LAYERS), TypeError,
         [r"LoRA\(r=...\) must be int", "got True"]),
    Case("alpha NaN", plain, lambda m: dk.adapt(m, dk.LoRA(alpha=float("nan")), LAYERS),
         ValueError, ["alpha=.* must be finite", "got nan"]),
    Case("dropout 1", plain, lambda m: dk.adapt(m, dk.LoRA(dropout=1.0), LAYERS), ValueError,
         ["dropout must be at least 0 and below 1", "got 1.0"]),
    Case("unknown option", plain, lambda m: dk.adapt(m, dk.LoRA(rank=8), LAYERS), TypeError,
         ["LoRA has no option 'rank'", "its options are .*alpha.* r, use_rslora"]),
    Case("an option and its alias", plain,
         lambda m: dk.adapt(m, dk.LoRA(alpha=8, lora_alpha=8), LAYERS), TypeError,
         ["lora_alpha is alpha", "give one of them"]),
    Case("unknown activation", plain, lambda m: dk.adapt(m, dk.LoRA(activation="swish"), LAYERS),
         ValueError, ["activation must be one of identity, relu", "got 'swish'"]),
    Case("unknown implementation", plain, lambda m: dk.adapt(m, dk.LoRA(impl="fast"), LAYERS),
         ValueError, ["impl must be one of auto, reference", "got 'fast'"]),
    Case("unknown method", plain, lambda m: dk.adapt(m, "lorra", LAYERS), TypeError,
         [r"method must be an instance such as SSB\(\)", "got 'lorra'", r"methods\(\) lists them"]),
    Case("a class for a method", plain, lambda m: dk.adapt(m, dk.LoRA, LAYERS), TypeError,
         ["method must be an instance such as", "got <class .*LoRA"]),
    Case("not a model", plain, lambda m: dk.adapt([m], dk.LoRA(), LAYERS), TypeError,
         ["model must be an nn.Module", "got list"]),
    # Which modules
    Case("no module matched", plain, lora(["q_proj"]), ValueError,
         [r"target_modules=\['q_proj'\] matches no module", *NAMED_IN_FULL]),
    Case("a name is no expression", plain, lora("q_proj"), ValueError,
         ["target_modules='q_proj' matches no module", *NAMED_IN_FULL]),
    Case("nothing is left", plain, lora("all-linear", exclude_modules=".*"), ValueError,
         ["matches no module", *NAMED_IN_FULL]),
    Case("invalid expression", plain, lora("(first"), ValueError,
         ["target_modules is no valid regular expression", r"'\(first'", "give a list"]),
    Case("invalid expression to exclude", plain, lora(LAYERS, exclude_modules="*"), ValueError,
         ["exclude_modules is no valid regular expression", r"'\*'", "give a list"]),
    Case("empty list", plain, lora([]), ValueError, ["must name at least one", "an empty list"]),
    Case("names of another type", plain, lora([0]), TypeError,
         ["target_modules must be a regular expression or a list of module names", r"got \[0\]"]),
    Case("only what cannot be adapted", plain, lora(["table"]), ValueError,
         ["no module can be adapted", "table", "it is a Embedding; only nn.Linear and Conv1D"]),
    Case("the model itself", lambda: nn.Linear(4, 4), lora(""), ValueError,
         ["no module can be adapted", r"use DecomposedLinear\(linear, method\)"]),
    Case("a tied weight, in a second call", lambda: adapted(targets=["head"]), lora(["tied"]),
         ValueError, ["tied matches", "it shares its weight with head, which is adapted"]),
    Case("rank_pattern of another type", plain, lora(LAYERS, rank_pattern=["first"]), TypeError,
         ["rank_pattern must be a dict from names to values", r"got \['first'\]"]),
    Case("rank_pattern that matches nothing", plain, lora(LAYERS, rank_pattern={"third": 4}),
         ValueError, ["rank_pattern names 'third'", "the layers are first, second"]),
    Case("rank_pattern that is no expression", plain, lora(LAYERS, rank_pattern={"(": 4}),
         ValueError, ["rank_pattern has a key that is no valid regular expression", r"'\('"]),
    Case("rank_pattern with rank 0", plain, lora(LAYERS, rank_pattern={"second": 0}), ValueError,
         ["r must be at least 1", "got 0"]),
    Case("alpha_pattern for a method without", plain,
         lambda m: dk.adapt(m, dk.SSB(), LAYERS, alpha_pattern={"first": 1.0}), ValueError,
         ["SSB has no option 'alpha'", "takes no pattern"]),
    Case("modules_to_save that are not there", plain, lora(LAYERS, modules_to_save=["pooler"]),
         ValueError, ["modules_to_save names 'pooler', which no module", "give a full name"]),
    Case("modules_to_save as text", plain, lora(LAYERS, modules_to_save="head"), TypeError,
         ["modules_to_save must be a list of module names", "got 'head'"]),
    Case("modules_to_save that are adapted", adapted,
         lora(["head"], modules_to_save=["second"], adapter_name="two"), ValueError,
         ["modules_to_save names second, which is adapted", r"remove\(model\) first"]),
    Case("everything is trained whole", plain, lora(["head"], modules_to_save=["head"]),
         ValueError, ["matches no module"]),
    Case("unknown bias", plain, lora(LAYERS, bias="some"), ValueError,
         ['bias must be "none", "all" or "lora_only"', "got 'some'"]),
    # Ranks and shapes that do not fit a layer
    Case("rank above the layer's", plain, lambda m: dk.adapt(m, dk.PiSSA(r=13), LAYERS),
         ValueError, [r"r must be at most min\(out_features, in_features\) = 12 for first",
                      "got 13", "lower r or exclude this module"]),
    Case("rank above the second layer's", plain,
         lambda m: dk.adapt(m, dk.SpectralAdditive(r=3), ["first", "head"],
                            rank_pattern={"head": 7}), ValueError,
         [r"= 6 for head", "got 7", "lower r or exclude"]),
    Case("blocks that do not divide", plain, lambda m: dk.adapt(m, dk.BOFT(block_size=5), LAYERS),
         ValueError, ["blocks must divide in_features = 12 of first", "got block_size = 5"]),
    # Values of the base
    Case("NaN in a weight", with_(holding(float("nan"))),
         lambda m: dk.adapt(m, dk.PiSSA(r=2), LAYERS), ValueError,
         ["weight of second must be finite for a singular value decomposition",
          "it holds NaN or infinity", "load the weights first, or exclude this module"]),
    Case("infinity in a weight", with_(holding(float("-inf"))),
         lambda m: dk.adapt(m, dk.MiLoRA(r=2), LAYERS), ValueError,
         ["weight of second must be finite", "NaN or infinity"]),
    Case("shared tensors on two devices", with_(on_meta("second")),
         lambda m: dk.adapt(m, dk.VeRA(r=2), LAYERS), ValueError,
         ["VeRA shares tensors among its layers", "on one device", "float32 on cpu, .*on meta"]),
    Case("shared tensors of two dtypes", with_(lambda m: m.second.double()),
         lambda m: dk.adapt(m, dk.VeRA(r=2), LAYERS), ValueError,
         ["must be of one dtype", "torch.float32 on cpu, torch.float64 on cpu"]),
    Case("integer weights", with_(lambda m: setattr(m.head, "weight", nn.Parameter(
             torch.ones(6, 16, dtype=torch.int8), requires_grad=False))), lora(["head"]),
         ValueError, ["head matches", "its weight is torch.int8, not floating point"]),
    # Names of adapters
    *(Case(f"adapter name {name!r}", plain, lora(LAYERS, adapter_name=name), ValueError,
           ["name must be 1 to 64 letters, digits, _ or -", "got"])
      for name in ("", "a.b", "../up", "a b", "a/b", "a\0", "é", "x" * 65, 3, None)),
    Case("adapter name of a method", plain, lora(LAYERS, adapter_name="keys"), ValueError,
         ["cannot be named 'keys'", "nn.ModuleDict has a method of it"]),
    Case("a name twice", adapted, lora(["second"]), ValueError,
         ["second already has an adapter 'default'", "choose another name"]),
    Case("an unknown adapter", two_adapters, lambda m: dk.set_adapter(m, "three"), ValueError,
         ["no layer has an adapter 'three'", "the model has one, two"]),
    Case("an adapter of a plain model", plain, lambda m: dk.set_adapter(m, "default"), ValueError,
         ["no layer has an adapter 'default'", "has none: call adapt"]),
    Case("a layer's unknown adapter", two_adapters, lambda m: m.second.set_adapter("two"),
         ValueError, ["the layer has no adapter 'two'", "it has one"]),
    Case("attaching a name twice", adapted, lambda m: m.first.attach("default", adapter(m)),
         ValueError, ["already has an adapter 'default'", "remove it or rename"]),
    Case("two adapters and trained biases", adapted,
         lora(LAYERS, adapter_name="two", bias="all"), ValueError,
         ["two adapters cannot share", "the model has default", "'two' cannot be added",
          'use bias="none", or BitFit']),
    # Merging
    Case("a method that cannot merge", with_(relu, adapted), dk.merge, ValueError,
         ["head cannot be merged", "a relu between down and up", "keep it unmerged"]),
    Case("NaN in an adapter", with_(lambda m: adapter(m, "second").up.fill_(torch.nan), adapted),
         dk.merge, ValueError,
         ["merged weight of second would hold NaN or infinity", "look at the adapter's values"]),
    Case("merged, then adapt", merged, lora(["head"], adapter_name="two"), RuntimeError,
         ["first has adapter 'default' merged", r"unmerge\(model\) first"]),
    Case("merged, then set_adapter", merged, lambda m: dk.set_adapter(m, "default"), RuntimeError,
         ["first is merged", r"unmerge\(model\) first"]),
    Case("merged, then disable", merged, lambda m: dk.disable(m).__enter__(), RuntimeError,
         ["merged into the weights", r"unmerge\(model\) first"]),
    Case("the base was not kept", lambda: merged(keep_base=False), dk.unmerge, RuntimeError,
         ["base weight of first was not kept", "merge with keep_base=True", "load the base model"]),
    Case("one layer's base was not kept", lambda: merged(keep_base=False),
         lambda m: m.second.unmerge(), RuntimeError,
         [r"\(W \+ d\) - d is not W", "merge with keep_base=True"]),
    # Without values
    Case("initialize without weights", with_(lora(LAYERS), with_(on_meta(*LAYERS))),
         dk.initialize, RuntimeError, ["first is on the meta device still", "load its weight"]),
    Case("merge without values", with_(lora(LAYERS), with_(on_meta(*LAYERS))), dk.merge,
         RuntimeError, ["has no values yet", "initialize"]),
    Case("nothing trains", with_(lambda m: m.requires_grad_(False)),
         lambda m: dk.param_groups(m, 1e-3), ValueError,
         ["trains no parameter", r"call adapt\(model, method\) first"]),
    # One layer
    Case("a layer that is no linear", plain, lambda m: dk.DecomposedLinear(m.table, dk.SSB()),
         TypeError, ["must be a plain torch.nn.Linear", "got Embedding", r"adapt\(model, ...\)"]),
    Case("a layer twice", adapted, lambda m: dk.DecomposedLinear(m.first, dk.SSB()),
         TypeError, ["must be a plain torch.nn.Linear", "got DecomposedLinear"]),
    Case("an adapter of another dtype", plain,
         lambda m: dk.DecomposedLinear(m.first, dk.SSB(), dtype=torch.float16), TypeError,
         ["on a torch.float32 layer must be torch.float32 or float32", "got torch.float16"]),
    Case("a layer's bad adapter name", plain,
         lambda m: dk.DecomposedLinear(m.first, dk.SSB(), adapter_name="a.b"), ValueError,
         ["name must be 1 to 64", "got 'a.b'"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_calls(case):
    model = case.make()
    before = Snapshot(model)
    with pytest.raises(case.error) as raised:
        case.call(model)
    assert type(raised.value) is case.error
    for words in case.words:
        assert raised.match(words)
    before.assert_unchanged()


# Files: the table of what saving and loading refuse; damaged files are in test_damaged_files.py


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved_on(make):
    def save(folder):
        dk.save_adapter(make(), folder)

    return save


def another_base():
    model = Net()
    with torch.no_grad():
        model.second.weight.add_(0.01)
    return model


def another_shape():
    model = Net()
    model.second = nn.Linear(20, 18, bias=False)
    model.head = nn.Linear(18, 6)
    return model


class FileCase(NamedTuple):
    what: str
    prepare: Any  # what is in the folder
    make: Any
    call: Any
    error: type[Exception]
    words: list[str]


def load(**options):
    return lambda model, folder: dk.load_adapter(model, folder, **options)


FILE_CASES = [
    FileCase("full disk", saved_on(adapted), adapted, dk.save_adapter, OSError,
             ["could not be saved in", "No space left on device", "before is unchanged"]),
    FileCase("no adapter to save", saved_on(adapted), plain, dk.save_adapter, ValueError,
             ["no adapter to save", r"call adapt\(model, method\) first"]),
    FileCase("unknown adapter to save", saved_on(adapted), two_adapters,
             lambda m, folder: dk.save_adapter(m, folder, "three"), ValueError,
             ["no adapter 'three' to save", "it has one, two"]),
    FileCase("empty folder", lambda folder: None, plain, load(), FileNotFoundError,
             ["must hold an adapter that save_adapter wrote", "no adapter.json"]),
    FileCase("another base", saved_on(adapted), another_base, load(), dk.AdapterFileError,
             ["trained on another base", "1 of 2 layers differ, first second",
              "load the base it was trained on", "or pass allow_other_base=True"]),
    FileCase("another dtype", saved_on(adapted), lambda: Net().bfloat16(), load(),
             dk.AdapterFileError, ["its weight was float32 and is bfloat16"]),
    FileCase("another shape", saved_on(adapted), another_shape, load(allow_other_base=True),
             dk.AdapterFileError, [r"weight of second must have shape \(16, 20\)",
                                   r"got \(18, 20\)", "the model it was trained on"]),
    FileCase("another model", saved_on(adapted), lambda: nn.Sequential(nn.Linear(12, 20)), load(),
             dk.AdapterFileError, ["adapter for 'first', which the model does not have",
                                   "Its linears are: 0"]),
    FileCase("a module of another class", saved_on(adapted),
             with_(lambda m: setattr(m, "first", nn.Embedding(20, 12))), load(),
             dk.AdapterFileError, ["first cannot take the file's adapter", "it is a Embedding"]),
    FileCase("a tied weight", saved_on(lambda: adapted(targets=["tied"])),
             lambda: adapted(name="other", targets=["head"]), load(), dk.AdapterFileError,
             ["tied cannot take the file's adapter", "shares its weight with head"]),
    FileCase("a name that is taken", saved_on(adapted), adapted, load(), ValueError,
             ["first already has an adapter 'default'", r"adapter_name=\.\.\."]),
    FileCase("a bad name", saved_on(adapted), plain, load(adapter_name="a/b"), ValueError,
             ["name must be 1 to 64 letters", "got 'a/b'"]),
    FileCase("into a merged model", saved_on(adapted), merged, load(adapter_name="two"),
             RuntimeError, ["merged", r"unmerge\(model\) first"]),
    FileCase("into a model without values", saved_on(adapted), lambda: Net().to("meta"), load(),
             dk.AdapterFileError, ["on the meta device", "load the base weights first"]),
    FileCase("into no model", saved_on(adapted), plain,
             lambda m, folder: dk.load_adapter([m], folder), TypeError,
             ["model must be an nn.Module", "got list"]),
    FileCase("trained biases beside another adapter", saved_on(lambda: adapted(bias="all")),
             lambda: adapted(name="other"), load(), ValueError, ["two adapters cannot share"]),
    FileCase("a copy of a module that is adapted",
             saved_on(lambda: adapted(modules_to_save=["head"])),
             lambda: adapted(name="other", targets=["head"]), load(), dk.AdapterFileError,
             ["a trained copy of 'head', which is adapted", r"remove\(model\) first"]),
    FileCase("a copy of another module", saved_on(lambda: adapted(modules_to_save=["head"])),
             with_(lambda m: setattr(m, "head", nn.Identity())), load(), dk.AdapterFileError,
             ["'head' must be a Linear", "got a Identity"]),
]  # fmt: skip


@pytest.mark.parametrize("case", FILE_CASES, ids=lambda case: case.what)
def test_bad_files_and_bases(case, tmp_path, monkeypatch):
    case.prepare(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = case.make()
    before = Snapshot(model)
    if case.what == "full disk":
        monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(case.error) as raised:
        case.call(model, tmp_path)
    for words in case.words:
        assert raised.match(words)
    before.assert_unchanged()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# Every method


every_method = pytest.mark.parametrize("name", sorted(METHODS))


@every_method
@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one(name, rank):
    if hasattr(METHODS[name], "r"):
        with pytest.raises(ValueError, match=f"r must be at least 1, got {rank}"):
            METHODS[name](r=rank)
    else:
        with pytest.raises(TypeError, match="has no option 'r'; its options are"):
            METHODS[name](r=rank)


@every_method
def test_a_weight_that_is_not_finite(name):
    """A method either decomposes the weight and refuses it, or starts as the layer it has."""
    model = with_(holding(float("nan")))()
    before = Snapshot(model)
    try:
        dk.adapt(model, METHODS[name].small(), LAYERS)
    except ValueError as error:
        assert "weight of second must be finite" in str(error)
        assert "exclude this module" in str(error)
        before.assert_unchanged()
        refused = True
    else:
        refused = False
    assert refused == (name in DECOMPOSE)


DECOMPOSE = {
    "milora", "pissa", "sam_parser", "spectral_additive", "spectral_rotational", "svdiff",
}  # fmt: skip


@every_method
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(4, 13), ValueError, r"x must end in .*= 12 columns.*, got shape \(4, 13\)"),
        (torch.ones(()), ValueError, r"x must end in .*= 12 columns.*, got shape \(\)"),
        (torch.ones(4, 12, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        (torch.ones(4, 12, dtype=torch.float16), TypeError,
         "x and weight must have one dtype, got torch.float16 and torch.float32; convert x or run"),
        (torch.ones(4, 12, device="meta"), ValueError, "must be on x's device meta, got cpu"),
    ],
    ids=["columns", "scalar", "integers", "dtype", "device"],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_input_that_does_not_fit(name, x, error, words, training):
    layer = dk.DecomposedLinear(nn.Linear(12, 8), METHODS[name].small()).train(training)
    before = Snapshot(layer)
    with pytest.raises(error, match=words):
        layer(x)
    before.assert_unchanged()


@every_method
def test_a_tensor_of_a_wrong_shape(name):
    """Whatever is put in place of a trained tensor: the layer refuses, and never broadcasts it."""

    def layer():
        return dk.DecomposedLinear(nn.Linear(12, 8), METHODS[name].small()).eval()

    shapes = {n: p.shape for n, p in layer().adapters["default"].named_parameters()}
    for tensor_name, shape in shapes.items():
        changed = layer()
        bad = nn.Parameter(torch.ones(*(size + 1 for size in shape)))
        if "shared" in tensor_name:  # larger ones are another layer's, a smaller one is too small
            bad = nn.Parameter(torch.ones(*(size - 1 for size in shape)), requires_grad=False)
        setattr(changed.adapters["default"], tensor_name, bad)
        with pytest.raises((ValueError, RuntimeError, IndexError)) as raised:
            changed(torch.ones(2, 12))
        assert len(str(raised.value)) > 20


@pytest.mark.parametrize(
    ("tensor", "value", "error", "words"),
    [
        ("down", torch.ones(3, 11), ValueError, r"down must have shape \(3, 12\), got \(3, 11\)"),
        ("up", torch.ones(8, 4), ValueError, r"up must have shape \(8, 3\), got \(8, 4\)"),
        ("up", torch.ones(8, 3, device="meta"), ValueError, "on x's device cpu, got meta"),
        ("up", torch.ones(8, 3).half(), TypeError, "down and up must have one dtype, got torch.fl"),
        ("down", torch.ones(12), ValueError, r"down must have shape \(r, 12\), got \(12,\)"),
    ],
    ids=["down", "up", "device", "dtype", "vector"],
)  # fmt: skip
def test_a_factor_of_lora(tensor, value, error, words):
    layer = dk.DecomposedLinear(nn.Linear(12, 8), dk.LoRA(r=3))
    setattr(layer.adapters["default"], tensor, nn.Parameter(value))
    with pytest.raises(error, match=words):
        layer(torch.ones(2, 12))


def test_a_forward_without_values():
    model = with_(on_meta("first"))()
    dk.adapt(model, dk.LoRA(r=2), ["first"])
    with pytest.raises(RuntimeError, match=r"'default' was made on the meta device .*initialize\("):
        model(torch.ones(2, 12, device="meta"))


def test_what_is_refused_for_one_layer_is_refused_for_all():
    """The last of many layers fails: the others have not been touched, adapters are not left."""
    model = Net()
    before = Snapshot(model)
    with pytest.raises(ValueError, match="= 6 for head"):
        dk.adapt(model, dk.PiSSA(r=8), ["first", "second", "head"])
    before.assert_unchanged()
    assert adapted_layers(model) == {}
    dk.adapt(model, dk.PiSSA(r=6), ["first", "second", "head"])
