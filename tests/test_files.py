"""save_adapter and load_adapter: what comes back, what a crash leaves, which bases are taken."""

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from snapshots import Snapshot, same_bits
from torch import nn

import decomp_kernels as dk
from decomp_kernels.interop import own_folder
from decomp_kernels.interop.contents import contents
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import METHODS

every_method = pytest.mark.parametrize("name", sorted(METHODS))


class Net(nn.Module):
    """Two linears of different shapes, one without bias, a norm, and a head."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 24, dtype=dtype)
        self.second = nn.Linear(24, 12, bias=False, dtype=dtype)
        self.norm = nn.BatchNorm1d(12, dtype=dtype)
        self.head = nn.Linear(12, 5, dtype=dtype)

    def forward(self, x):
        return self.head(self.norm(self.second(torch.relu(self.first(x)))))


LAYERS = ["first", "second"]


def inputs(dtype=torch.float32):
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(5)).to(dtype)


def train(model, size=0.2):
    """Move whatever trains, and make the choices that some methods make in training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((size * noise).to(tensor.dtype))
    for layer in adapted_layers(model).values():
        for adapter in layer.adapters.values():
            if hasattr(adapter.method, "select_directions"):  # LoRA-Dash after its warm-up
                adapter.method.select_directions(adapter, layer.base())
    return model.eval()


def trained(method=None, dtype=torch.float32, **options):
    return train(dk.adapt(Net(dtype), method or dk.LoRA(r=3), LAYERS, **options))


def assert_same(loaded, model, x):
    """Output and every tensor, bit for bit; the same ones train, and it really is adapted."""
    assert same_bits(loaded.eval()(x), model(x))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert same_bits(theirs[name], tensor), name
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, loaded)]
    assert flags[0] == flags[1]
    assert not torch.equal(model(x), Net(x.dtype).eval()(x))


# What comes back


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip(name, dtype, tmp_path, monkeypatch):
    model = trained(METHODS[name].small(), dtype, modules_to_save=["head", "norm"])
    dk.save_adapter(model, tmp_path / "new" / "folder")
    fresh, before = Net(dtype), torch.get_rng_state()
    for svd in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, svd, _not_called_with_values(getattr(torch.linalg, svd)))
    loaded = dk.load_adapter(fresh, tmp_path / "new" / "folder")
    assert loaded is fresh
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert_same(loaded, model, inputs(dtype))


def _not_called_with_values(function):
    def checked(tensor, *args, **kwargs):
        assert tensor.is_meta, "a decomposition for values that come from the file"
        return function(tensor, *args, **kwargs)

    return checked


@pytest.mark.parametrize(
    "method",
    [
        dk.BOFT(block_size=2, n_butterfly_factor=3), dk.OFT(r=2, use_cayley_neumann=False),
        dk.Sparse(mask="magnitude", r=1), dk.DoRA(r=2, cache_norm=True), dk.PiSSA(r=2, niter=2),
        dk.DoRA(r=2, norm_grad=True, use_rslora=True), dk.LoRA(r=2, alpha=3, activation="gelu"),
    ],
    ids=str,
)  # fmt: skip
def test_round_trip_with_options(method, tmp_path):
    model = trained(method)
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(Net(), tmp_path)
    assert_same(loaded, model, inputs())
    assert loaded.first.adapters["default"].method == method


def test_a_pruned_adapter_comes_back_as_the_sparse_one_it_is(tmp_path):
    from decomp_kernels.methods.diff_pruning import fix_masks

    model = fix_masks(trained(dk.DiffPruning()), density=0.2)
    dk.save_adapter(model, tmp_path)
    assert_same(dk.load_adapter(Net(), tmp_path), model, inputs())


@every_method
def test_a_loaded_adapter_goes_on_training(name, tmp_path):
    model = trained(METHODS[name].small())
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(Net(), tmp_path).eval()
    for _ in range(2):
        for one in (model, loaded):
            loss = one(inputs()).square().mean()
            named = {n: p for n, p in one.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            with torch.no_grad():
                for tensor, grad in zip(named.values(), grads, strict=True):
                    if grad is not None:
                        tensor.sub_(0.1 * grad)
    assert_same(loaded, model, inputs())


@every_method
def test_a_loaded_adapter_merges_and_goes(name, tmp_path):
    model = trained(METHODS[name].small())
    dk.save_adapter(model, tmp_path)
    loaded, base = dk.load_adapter(Net(), tmp_path), Net()
    if adapted_layers(loaded)["first"].adapters["default"].method.why_not_mergeable is None:
        dk.merge(loaded)
        dk.merge(model)
        assert same_bits(loaded.eval()(inputs()), model(inputs()))
        dk.unmerge(loaded)
    dk.remove(loaded)
    assert all(same_bits(a, b) for a, b in zip(loaded.state_dict().values(),
                                               base.state_dict().values()))  # fmt: skip


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("name", ["lora", "dora", "ssb", "pissa", "vera"])
def test_a_model_that_was_converted_after_adapting(name, convert, tmp_path):
    model = getattr(trained(METHODS[name].small()), convert)()
    dtype = model.first.weight.dtype
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(getattr(Net(), convert)(), tmp_path)
    assert_same(loaded, model, inputs(dtype))


def test_ranks_and_methods_that_differ_between_layers(tmp_path):
    model = dk.adapt(Net(), dk.LoRA(r=2), LAYERS, rank_pattern={"second": 5})
    dk.adapt(model, dk.SSB(), ["head"])
    train(model)
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(Net(), tmp_path)
    assert_same(loaded, model, inputs())
    assert [layer.adapters["default"].method for layer in adapted_layers(loaded).values()] == [
        dk.LoRA(r=2), dk.LoRA(r=5), dk.SSB(),
    ]  # fmt: skip


def test_trained_biases(tmp_path):
    model = trained(bias="all")
    assert not torch.equal(model.norm.bias, Net().norm.bias)
    model.requires_grad_(False)  # for inference: they are saved all the same
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(Net(), tmp_path)
    assert same_bits(loaded.eval()(inputs()), model(inputs()))
    assert loaded.first.bias.requires_grad
    assert loaded.norm.bias.requires_grad
    again = tmp_path / "again"
    dk.save_adapter(loaded, again)
    assert_same(dk.load_adapter(Net(), again), loaded, inputs())


def test_several_adapters(tmp_path):
    model = trained(dk.LoRA(r=3), adapter_name="one", modules_to_save=["head"])
    dk.adapt(model, dk.SSB(), ["first", "head"][:1], adapter_name="two", modules_to_save=["head"])
    train(model)
    expected = {}
    for name in ("one", "two"):
        dk.set_adapter(model, name)
        dk.save_adapter(model, tmp_path / name)  # the active one
        dk.save_adapter(model, tmp_path / f"named-{name}", name)
        expected[name] = model(inputs())
    loaded = dk.load_adapter(Net(), tmp_path / "two")
    assert same_bits(loaded.eval()(inputs()), expected["two"])
    dk.load_adapter(loaded, tmp_path / "named-one", adapter_name="1")
    assert same_bits(loaded.eval()(inputs()), expected["one"])
    assert loaded.first.active_adapter == "1"
    assert [p.requires_grad for p in loaded.first.adapters["two"].parameters()] == [False, False]
    assert same_bits(dk.set_adapter(loaded, "two")(inputs()), expected["two"])
    with pytest.raises(ValueError, match="has an adapter 'two'; load this one under another name"):
        dk.load_adapter(loaded, tmp_path / "two")


def test_which_adapter_must_be_clear(tmp_path):
    model = trained(adapter_name="one")
    dk.adapt(model, dk.SSB(), ["first"], adapter_name="two")
    model.first.set_adapter("one")
    model.second.set_adapter("one")
    dk.save_adapter(model, tmp_path)
    assert dk.load_adapter(Net(), tmp_path).second.active_adapter == "one"
    model.first.set_adapter("two")
    with pytest.raises(ValueError, match="adapter_name must be one of one, two: .* 2 are active"):
        dk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'three' to save; it has one, two"):
        dk.save_adapter(model, tmp_path, "three")
    with pytest.raises(ValueError, match="no adapter to save; call adapt"):
        dk.save_adapter(Net(), tmp_path)


def test_one_layer_alone(tmp_path):
    def linear():
        torch.manual_seed(3)
        return nn.Linear(16, 8)

    layer = train(dk.DecomposedLinear(linear(), dk.DoRA(r=2)))
    dk.save_adapter(layer, tmp_path)
    loaded = dk.load_adapter(linear(), tmp_path)
    assert type(loaded) is dk.DecomposedLinear
    assert same_bits(loaded(inputs()), layer(inputs()))


def test_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
        return GPT2LMHeadModel(config).eval()

    for method in (dk.LoRA(r=2), dk.DoRA(r=2), dk.VeRA(r=4), dk.PiSSA(r=2)):
        model = train(dk.adapt(gpt2(), method))
        tokens = torch.arange(8)[None]
        dk.save_adapter(model, tmp_path)
        described = json.loads((tmp_path / "adapter.json").read_text())
        attention = described["layers"]["transformer.h.0.attn.c_attn"]
        assert attention["module"] == "Conv1D"
        assert attention["shape"] == [48, 16]  # out, in
        loaded = dk.load_adapter(gpt2(), tmp_path)
        assert same_bits(loaded(tokens).logits, model(tokens).logits)
        assert not torch.equal(model(tokens).logits, gpt2()(tokens).logits)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        dk.save_adapter(dk.merge(model), tmp_path)  # from the base that merging kept
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shared_tensors_are_stored_once_and_stay_one(tmp_path):
    model = trained(dk.VeRA(r=4))
    dk.save_adapter(model, tmp_path)
    table = json.loads((tmp_path / "adapter.json").read_text())["tensors"]
    assert sorted(key for key in table if "shared" in key) == [
        "layers.first.shared_down", "layers.first.shared_up",
    ]  # fmt: skip
    loaded = dk.load_adapter(Net(), tmp_path)
    one, two = (loaded.get_submodule(name).adapters["default"] for name in LAYERS)
    assert one.shared_down is two.shared_down
    assert one.shared_up is two.shared_up
    assert not one.shared_up.requires_grad
    # Tensors that assign=True has made two objects of are one in the file, and again when loaded.
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.first.adapters["default"].shared_up is not (
        model.second.adapters["default"].shared_up
    )
    dk.save_adapter(model, tmp_path / "again")
    assert _tensor_bytes(tmp_path / "again") == _tensor_bytes(tmp_path)
    assert_same(dk.load_adapter(Net(), tmp_path / "again"), trained(dk.VeRA(r=4)), inputs())


def test_projections_of_two_calls_of_adapt(tmp_path):
    """The second call shares among its own layers, and its projections have another size."""
    model = dk.adapt(Net(), dk.VeRA(r=4), ["second"])
    dk.adapt(model, dk.VeRA(r=4), ["first"])
    train(model)
    assert model.first.adapters["default"].shared_down.shape == (4, 16)
    dk.save_adapter(model, tmp_path)
    assert_same(dk.load_adapter(Net(), tmp_path), model, inputs())


def test_the_file_may_be_replaced_while_its_tensors_are_in_use(tmp_path):
    model = trained()
    dk.save_adapter(model, tmp_path)
    loaded = dk.load_adapter(Net(), tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(loaded, model, inputs())
    # Memory of torch's own: what shards parameters resizes their storage.
    assert all(p.untyped_storage().resizable() for p in loaded.parameters())


def test_other_readers_can_read_the_tensors(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = trained(dtype=torch.bfloat16, modules_to_save=["norm"])
    dk.save_adapter(model, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    description, ours = contents(model, None)
    theirs = load_file(path)
    assert theirs.keys() == ours.keys() == description.tensors.keys()
    assert all(same_bits(theirs[key], ours[key].detach()) for key in ours)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(ours)


def test_what_the_json_says(tmp_path):
    dk.save_adapter(trained(dk.LoRA(r=3, lora_alpha=6, impl="reference")), tmp_path)
    said = json.loads((tmp_path / "adapter.json").read_text())
    assert said["format"] == "decomp_kernels adapter"
    assert said["format_version"] == 1
    assert said["adapter_name"] == "default"
    (method,) = said["methods"]
    options = {"r": 3, "alpha": 6, "dropout": 0.0, "use_rslora": False, "activation": "identity",
               "lora_bias": False}  # fmt: skip
    assert method == {"name": "lora", "options": options}
    assert said["tensors"]["layers.first.down"] == {"dtype": "float32", "shape": [3, 16]}
    assert said["layers"]["second"]["bias"] is False
    loaded = dk.load_adapter(Net(), tmp_path)
    assert loaded.first.adapters["default"].method.impl == "auto"  # where, not what, is computed


# Which bases are taken


def _altered(what):
    net = Net().eval()
    with torch.no_grad():
        if what == "values":
            net.second.weight[3, 4] += 1e-3
        elif what == "bias values":
            net.first.bias[0] += 1e-3
        elif what == "dtype":
            net.double()
        elif what == "bias":
            net.first.bias = None
    return net


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("values", "1 of 2 layers differ, first second: its weight or bias has other values"),
        ("bias values", "1 of 2 layers differ, first first: its weight or bias has other values"),
        ("dtype", "2 of 2 layers differ, first first: its weight was float32 and is float64"),
        ("bias", "1 of 2 layers differ, first first: it had a bias and has no bias"),
    ],
)
def test_another_base_is_refused_unless_allowed(what, message, tmp_path):
    model = trained()
    dk.save_adapter(model, tmp_path)
    other = _altered(what)
    snapshot = Snapshot(other, inputs(other.first.weight.dtype))
    with pytest.raises(dk.AdapterFileError, match=f"{message}; .*allow_other_base=True"):
        dk.load_adapter(other, tmp_path)
    snapshot.assert_unchanged()
    dk.load_adapter(other, tmp_path, allow_other_base=True)
    theirs = other.first.adapters["default"].up
    assert theirs.dtype == torch.promote_types(other.first.weight.dtype, torch.float32)
    assert torch.equal(theirs, model.first.adapters["default"].up.to(theirs.dtype))
    assert other(inputs(other.first.weight.dtype)).isfinite().all()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_adapter_can_move_to_a_base_of_another_dtype(name, tmp_path):
    dk.save_adapter(trained(METHODS[name].small(), torch.float64), tmp_path)
    other = dk.load_adapter(Net(torch.float64).bfloat16(), tmp_path, allow_other_base=True)
    exact = trained(METHODS[name].small(), torch.float64)(inputs(torch.float64))
    error = (other.eval()(inputs(torch.bfloat16)).double() - exact).norm() / exact.norm()
    assert error < 16 * torch.finfo(torch.bfloat16).eps  # four layers and a norm, each rounded


def test_large_weights_are_sampled_and_still_told_apart(tmp_path):
    def wide(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(400, 300))

    dk.save_adapter(dk.adapt(wide(0), dk.SSB(), ["0"]), tmp_path)
    dk.load_adapter(wide(0), tmp_path)
    with pytest.raises(dk.AdapterFileError, match="other values"):
        dk.load_adapter(wide(1), tmp_path)
    slightly = wide(0)
    with torch.no_grad():  # one element in a thousand
        slightly[0].weight.view(-1)[torch.randperm(120000)[:120]] += 1e-3
    with pytest.raises(dk.AdapterFileError, match="other values"):
        dk.load_adapter(slightly, tmp_path)
    at_the_end = wide(0)  # a layer of which the last tenth was trained
    with torch.no_grad():
        at_the_end[0].weight[270:] += 1e-3
    with pytest.raises(dk.AdapterFileError, match="other values"):
        dk.load_adapter(at_the_end, tmp_path)
    transposed = wide(0)  # another memory layout is no other base
    transposed[0].weight = nn.Parameter(transposed[0].weight.detach().T.contiguous().T)
    dk.load_adapter(transposed, tmp_path)


def test_saving_while_merged(tmp_path):
    model = trained(dk.DoRA(r=3), torch.bfloat16)
    dk.save_adapter(model, tmp_path / "before")
    dk.save_adapter(dk.merge(model), tmp_path / "merged")
    for name in (path.name for path in (tmp_path / "before").iterdir()):
        assert (tmp_path / "before" / name).read_bytes() == (
            tmp_path / "merged" / name
        ).read_bytes()
    gone = dk.merge(trained(), keep_base=False)
    dk.save_adapter(gone, tmp_path / "gone")
    with pytest.raises(dk.AdapterFileError, match="saved after merging for good"):
        dk.load_adapter(Net(), tmp_path / "gone")
    loaded = dk.load_adapter(Net(), tmp_path / "gone", allow_other_base=True)
    assert_same(loaded, trained(), inputs())


def test_an_adapted_base_is_the_same_base(tmp_path):
    """A second adapter's file fits, whatever the first one does to the layer."""
    dk.save_adapter(trained(adapter_name="two"), tmp_path)
    loaded = dk.load_adapter(trained(dk.PiSSA(r=2), adapter_name="one"), tmp_path)
    assert same_bits(loaded(inputs()), trained()(inputs()))
    dk.set_adapter(loaded, "one")
    with pytest.raises(RuntimeError, match=r"adapter 'one' merged; call unmerge\(model\) first"):
        dk.load_adapter(dk.merge(loaded), tmp_path, adapter_name="three")


# What a crash leaves


class Killed(BaseException):
    """The process ends here: nothing after it runs, no clean-up either."""


class Faults:
    """Counts the steps of a save, and lets step number ``at`` fail."""

    def __init__(self, monkeypatch, at=None, error=None):
        self.at, self.error, self.steps = at, error, []
        real = {"replace": os.replace, "fsync": os.fsync, "unlink": Path.unlink}

        def step(name, arguments):
            self.steps.append(name)
            if len(self.steps) - 1 == self.at:
                raise self.error(errno.ENOSPC, "No space left on device")

        def replace_(*arguments):
            step("replace", arguments)
            return real["replace"](*arguments)

        def fsync(*arguments):
            step("fsync", arguments)
            return real["fsync"](*arguments)

        def unlink(path, **options):
            if self.error is Killed and self.at is not None and len(self.steps) > self.at:
                return None
            return real["unlink"](path, **options)

        def opened(path, mode):
            step("open", path)
            return File(open(path, mode), step)

        monkeypatch.setattr(os, "replace", replace_)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(own_folder, "open", opened, raising=False)


class File:
    """A file whose writing may stop in the middle of a piece."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def write(self, piece):
        self.file.write(piece[: len(piece) // 2])
        self.step("write", piece)
        self.file.write(piece[len(piece) // 2 :])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def _tensor_bytes(folder):
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


def _steps_of_a_save():
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        faults = Faults(patch)
        dk.save_adapter(dk.adapt(Net(), dk.SSB(), LAYERS), folder)
    return faults.steps


STEPS = _steps_of_a_save()


def test_the_steps_are_what_the_next_tests_take_them_for():
    tensors = ["open", *["write"] * 5, "fsync", "replace"]  # a header and four scales
    assert [*tensors, "open", "write", "fsync", "fsync", "replace", "fsync"] == STEPS


@pytest.mark.parametrize("there_before", [True, False], ids=["overwriting", "first"])
@pytest.mark.parametrize("error", [OSError, Killed, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(len(STEPS)), ids=lambda i: f"{i}-{STEPS[i]}")
def test_a_failed_save_leaves_the_old_adapter_or_the_new_one(
    at, error, there_before, tmp_path, monkeypatch
):
    old, new = (train(dk.adapt(Net(), dk.SSB(), LAYERS), size) for size in (0.1, 0.3))
    if there_before:
        dk.save_adapter(old, tmp_path)
    listed = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        Faults(patch, at, error)
        committed = at == len(STEPS) - 1
        if committed and error is OSError:
            dk.save_adapter(new, tmp_path)  # the new one is in place already
        else:
            with pytest.raises(error) as raised:
                dk.save_adapter(new, tmp_path)
    if error is OSError and not committed:
        assert raised.value.errno == errno.ENOSPC
        assert "could not be saved in" in str(raised.value)
        assert "No space left on device; what was there before is unchanged" in str(raised.value)
    if committed:
        assert_same(dk.load_adapter(Net(), tmp_path), new, inputs())
    elif there_before:
        assert_same(dk.load_adapter(Net(), tmp_path), old, inputs())
    else:
        with pytest.raises(FileNotFoundError, match=r"there is no adapter\.json in it"):
            dk.load_adapter(Net(), tmp_path)
    if error is not Killed and not committed:
        assert sorted(path.name for path in tmp_path.iterdir()) == listed
    dk.save_adapter(new, tmp_path)  # and the next save cleans up
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(dk.load_adapter(Net(), tmp_path), new, inputs())


def test_an_interrupt_just_after_the_renaming_keeps_the_new_adapter(tmp_path, monkeypatch):
    model, real = trained(), os.replace

    def interrupted(source, target):
        real(source, target)
        if str(target).endswith(".json"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dk.save_adapter(model, tmp_path)
    assert_same(dk.load_adapter(Net(), tmp_path), model, inputs())


def test_saving_the_same_adapter_again_is_safe_at_every_step(tmp_path, monkeypatch):
    """Its tensor file has the same name: it must not be cleaned away with the failed attempt."""
    model = dk.adapt(Net(), dk.SSB(), LAYERS)
    train(model)
    dk.save_adapter(model, tmp_path)
    for at in range(len(STEPS) - 1):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="could not be saved"):
            Faults(patch, at, OSError)
            dk.save_adapter(model, tmp_path)
        assert_same(dk.load_adapter(Net(), tmp_path), model, inputs())


def test_files_of_others_stay(tmp_path):
    for name in ("notes.txt", "model.safetensors", "adapter-old.safetensors", ".hidden.tmp"):
        (tmp_path / name).write_text("mine")
    dk.save_adapter(trained(), tmp_path)
    dk.save_adapter(trained(dk.SSB()), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="could not be saved in .*file"):
        dk.save_adapter(trained(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="must hold an adapter that save_adapter wrote"):
        dk.load_adapter(Net(), tmp_path / "file")


# What cannot be saved


def test_values_that_cannot_be_loaded_are_not_saved(tmp_path):
    good = trained()
    dk.save_adapter(good, tmp_path)
    bad = trained()
    with torch.no_grad():
        bad.second.adapters["default"].up[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.second.up must be finite to be saved"):
        dk.save_adapter(bad, tmp_path)
    assert_same(dk.load_adapter(Net(), tmp_path), good, inputs())


def test_a_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"count": 3}

        def set_extra_state(self, state):
            pass

    model = Net()
    model.head = Odd(12, 5)
    dk.adapt(model, dk.SSB(), LAYERS, modules_to_save=["head"])
    with pytest.raises(TypeError, match="head keeps _extra_state in its state, .* a dict"):
        dk.save_adapter(model, tmp_path)


def test_an_adapter_without_values(tmp_path):
    model = Net().to("meta")
    dk.adapt(model, dk.LoRA(r=2), LAYERS)
    with pytest.raises(RuntimeError, match="made on the meta device .*initialize"):
        dk.save_adapter(model, tmp_path)
    dk.save_adapter(trained(), tmp_path)
    with pytest.raises(dk.AdapterFileError, match="meta device; load the base weights first"):
        dk.load_adapter(Net().to("meta"), tmp_path, allow_other_base=True)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """A pickle where the tensors should be, with a fitting checksum, is refused and never run."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    from decomp_kernels.interop.description import to_text

    description, _ = contents(trained(), None)
    for payload in (pickle.dumps(Bomb()), _torch_file(Bomb())):
        import hashlib

        sha256 = hashlib.sha256(payload).hexdigest()
        (tmp_path / "adapter.json").write_text(to_text(replace(description, sha256=sha256)))
        (tmp_path / f"adapter-{sha256[:16]}.safetensors").write_bytes(payload)
        with pytest.raises(dk.AdapterFileError, match="no safetensors file"):
            dk.load_adapter(Net(), tmp_path)
    assert not ran.exists()


def _torch_file(value):
    import io

    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()
