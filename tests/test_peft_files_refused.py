"""PEFT's adapter files that are damaged, of a variant that is not computed here, or not PEFT's."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft_folders import CASES, TARGETS, Net, config_of, inputs, moved, ours, tensors_of, theirs
from safetensors.torch import save_file
from snapshots import Snapshot
from torch import nn

import decomp_kernels as dk
from decomp_kernels.testing import relative_error

# (case, changed fields, what the error names)
FIELDS = [
    ("lora", {"peft_type": "POLY"}, "peft_type must be one of .*LORA.*'POLY'"),
    ("lora", {"peft_type": None}, "peft_type"),
    ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' took a part of the base"),
    ("lora", {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ("lora", {"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    ("lora", {"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\]"),
    ("lora", {"arrow_config": {"top_k": 2}}, "arrow_config"),
    ("lora", {"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ("lora", {"use_qalora": True}, "use_qalora=True"),
    ("lora", {"monteclora_config": {"N": 2}}, "monteclora_config"),
    ("lora", {"kasa_config": {"beta": 1}}, "kasa_config"),
    ("lora", {"velora_config": {"x": 1}}, "velora_config"),
    ("lora", {"init_lora_weights": "mica"}, "init_lora_weights='mica', which decomp"),
    ("lora", {"trainable_token_indices": [1]}, "trainable_token_indices"),
    ("lora", {"target_parameters": ["experts.w"]}, "target_parameters"),
    ("lora", {"layer_replication": [[0, 1]]}, "layer_replication"),
    ("lora", {"megatron_config": {"x": 1}}, "megatron_config"),
    ("lora", {"use_dora": True, "lora_bias": True}, "lora_bias=True|use_dora=True"),
    ("lora", {"some_later_variant": "on"}, "some_later_variant='on'"),
    ("hira", {"hira_dropout": 0.1}, "hira_dropout=0.1.*set it to 0"),
    ("oft", {"module_dropout": 0.1}, "module_dropout=0.1"),
    ("loha", {"rank_dropout": 0.1}, "rank_dropout=0.1"),
    ("boft", {"boft_dropout": 0.1}, "boft_dropout=0.1"),
    ("lora", {"r": "four"}, "r=...|must be int"),
    ("lora", {"r": 5}, r"must have shape \(5, 48\)"),
    ("lora", {"lora_alpha": None}, "lora|alpha"),
    ("lora", {"rank_pattern": {"(": 2}}, "must be as PEFT writes them"),
    ("lora", {"rank_pattern": [3]}, "must be as PEFT writes them"),
    ("lora", {"modules_to_save": 5}, "must be as PEFT writes them"),
    ("adalora", {"rank_pattern": {"block.up.lora_E": [True]}}, "rank_pattern must have init_r = 4"),
    ("vera", {"r": 7}, "must have shape"),
    ("oft", {"block_share": True}, "must have shape"),
    ("oft", {"peft_version": "0.17.1"}, "must be of PEFT 0.18 or later"),
    ("oft", {"peft_version": None}, "must be of PEFT 0.18 or later"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of PEFT's for each case that is changed below."""
    made = {}
    for name in dict.fromkeys(name for name, *_ in FIELDS):
        made[name] = tmp_path_factory.mktemp("peft")
        theirs(CASES[name], torch.float32).save_pretrained(made[name])
    return made


def copied(folder, target, **changed):
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    config = {**config_of(folder), **changed}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("name", "changed", "words"), FIELDS)
def test_a_configuration_that_is_not_computed_here_is_refused(
    name, changed, words, folders, tmp_path
):
    model = Net(torch.float32)
    before = Snapshot(model)
    dk.load_adapter(Net(torch.float32), copied(folders[name], tmp_path / "as it is"))
    with pytest.raises(dk.AdapterFileError, match=words):
        dk.load_adapter(model, copied(folders[name], tmp_path / "changed", **changed))
    before.assert_unchanged()


KEYS = [
    ("base_model.model.block.up.lora_embedding_A", (4, 32), "no tensor of this method on a linear"),
    ("base_model.model.block.nothing.lora_A.weight", (4, 32), "'block.nothing'.*does not have"),
    ("base_model.model.block.norm.lora_A.weight", (4, 32), "block.norm.*LayerNorm"),
    ("base_model.model.head.weight", (5, 32), "none of modules_to_save"),
    ("base_model.model.block.norm.bias", (32,), "none of modules_to_save"),
    ("block.up.lora_A.weight", (4, 32), "no tensor of this method"),
    ("base_model.model.block.up.lora_A.weight", (4, 31), "must have shape"),
    ("base_model.model.block.up.lora_A.weight", (128,), "must have shape"),
]


@pytest.mark.parametrize(("key", "shape", "words"), KEYS)
def test_a_tensor_that_fits_nowhere_is_refused(key, shape, words, folders, tmp_path):
    folder = copied(folders["lora"], tmp_path / "changed")
    save_file({**tensors_of(folder), key: torch.zeros(shape)}, folder / "adapter_model.safetensors")
    model = Net(torch.float32)
    before = Snapshot(model)
    with pytest.raises(dk.AdapterFileError, match=words):
        dk.load_adapter(model, folder)
    before.assert_unchanged()


def test_a_column_of_two_columns_is_no_column(tmp_path):
    """Taking the first would pass for a tensor of the right shape."""
    theirs(CASES["ia3"]).save_pretrained(tmp_path)
    tensors, key = tensors_of(tmp_path), "base_model.model.block.up.ia3_l"
    tensors[key] = tensors[key].repeat(1, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(dk.AdapterFileError, match=r"ia3_l has shape \(48, 2\)"):
        dk.load_adapter(Net(), tmp_path)


def test_a_tensor_that_is_missing_or_not_finite_is_refused(folders, tmp_path):
    folder, file = copied(folders["lora"], tmp_path / "changed"), "adapter_model.safetensors"
    tensors = tensors_of(folder)
    key = "base_model.model.block.up.lora_B.weight"
    save_file({k: t for k, t in tensors.items() if k != key}, folder / file)
    with pytest.raises(dk.AdapterFileError, match=r"lacks 'layers\.block\.up\.up'"):
        dk.load_adapter(Net(torch.float32), folder)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, folder / file)
    with pytest.raises(dk.AdapterFileError, match=r"layers\.block\.up\.up must be finite"):
        dk.load_adapter(Net(torch.float32), folder)


def test_the_folder_around_an_adapter_says_where_it_is(tmp_path):
    """PEFT's save_pretrained makes a folder for an adapter of another name than "default"."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS)
    peft.get_peft_model(Net(torch.float32), config, "mine").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is one in .*mine"):
        dk.load_adapter(Net(torch.float32), tmp_path)
    dk.load_adapter(Net(torch.float32), tmp_path / "mine")


def test_a_pickle_is_not_read(tmp_path):
    theirs(CASES["lora"]).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(dk.AdapterFileError, match="a pickle and can run any code"):
        dk.load_adapter(Net(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(dk.AdapterFileError, match=r"must hold adapter_model\.safetensors"):
        dk.load_adapter(Net(), tmp_path)


def test_pissa_is_taken_once_peft_has_made_a_lora_of_it(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    stock = peft.get_peft_model(Net(torch.float32), config)
    stock.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    stock.save_pretrained(tmp_path / "start")
    stock.peft_config["default"].init_lora_weights = "pissa"
    y = moved(stock)(inputs(torch.float32))
    stock.save_pretrained(tmp_path / "pissa")
    with pytest.raises(dk.AdapterFileError, match="path_initial_model_for_weight_conversion"):
        dk.load_adapter(Net(torch.float32), tmp_path / "pissa")
    stock.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    model = dk.load_adapter(Net(torch.float32), tmp_path / "lora")
    assert model.block.up.adapters["default"].method.r == 8
    assert relative_error(model(inputs(torch.float32)), y) < 1e-5  # W_res and W both in float32


@pytest.mark.parametrize("name", ["lora", "sparse", "vera"])
def test_damaged_files(name, tmp_path):
    """Refused with a clear text, or what was saved but for numbers that look like others."""
    model = Net(torch.float32)
    before = Snapshot(model)
    dk.save_adapter(ours(CASES[name], torch.float32), tmp_path / "whole", format="peft")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    chance, folder, refused = random.Random(0), tmp_path / "damaged", 0
    folder.mkdir()
    for _ in range(150):
        for file, data in whole.items():
            (folder / file).write_bytes(data)
        file = chance.choice(sorted(whole))
        data = bytearray(whole[file])
        match chance.randrange(3):
            case 0:
                data = data[: chance.randrange(len(data))]
            case 1:
                at = chance.randrange(min(len(data), 2000))
                data[at] = chance.randrange(256)
            case 2:
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
        (folder / file).write_bytes(data)
        try:
            dk.load_adapter(Net(torch.float32), folder)
        except dk.AdapterFileError as error:
            refused += 1
            assert len(str(error)) > 40
            with pytest.raises(dk.AdapterFileError):
                dk.load_adapter(model, folder)
            before.assert_unchanged()
    assert refused > 60


UNWRITABLE = [
    (dk.SSB(), {}, "PEFT has no SSB.*as_lora.*the format of decomp_kernels"),
    (dk.PiSSA(r=4), {}, "PEFT has no PiSSA"),
    (dk.LoRA(r=4, activation="relu"), {}, r"LoRA\(activation='relu'\).*has 'identity' there"),
    (dk.Sparse(density=0.1), {}, "Sparse.density=0.1. cannot be saved as PEFT's ShiraConfig"),
    (dk.Sparse(), {}, "Sparse must have r.*got a density"),
    (dk.HiRA(r=4), {"rank_pattern": {"up": 2}}, "HiraConfig has one r for all layers"),
    (dk.LoHa(r=2), {"bias": "all"}, "LoHaConfig trains no biases"),
    (dk.LoRA(r=4), {"modules_to_save": ["block.norm", "head"], "target_modules": ["xhead"]},
     "PEFT would train xhead whole too|modules_to_save matches by a name's last letters"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "words"), UNWRITABLE)
def test_what_peft_does_not_have_is_not_written(method, options, words, tmp_path):
    model = Net()
    model.add_module("xhead", nn.Linear(3, 3).double())
    model = dk.adapt(model, method, **{"target_modules": TARGETS, **options})
    with pytest.raises(ValueError, match=words):
        dk.save_adapter(model, tmp_path / "run", format="peft")
    assert not (tmp_path / "run").exists()


def test_layers_of_two_configurations_are_not_written(tmp_path):
    model = dk.adapt(Net(), dk.LoRA(r=4), ["block.up"])
    model.block.down = dk.DecomposedLinear(model.block.down, dk.DoRA(r=4))
    with pytest.raises(ValueError, match="must be of one PEFT configuration"):
        dk.save_adapter(model, tmp_path, format="peft")


def test_the_format_must_be_known_and_a_folder_holds_one(tmp_path):
    model = ours(CASES["lora"])
    with pytest.raises(ValueError, match="format must be one of decomp_kernels, peft, got 'hf'"):
        dk.save_adapter(model, tmp_path, format="hf")
    dk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"no adapter of another format, and it has adapter\.json"):
        dk.save_adapter(model, tmp_path, format="peft")
    theirs(CASES["lora"]).save_pretrained(tmp_path)
    with pytest.raises(dk.AdapterFileError, match="must hold one adapter, and it has"):
        dk.load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("at", range(7))
def test_a_failed_save_leaves_the_new_adapter_or_none(at, tmp_path, monkeypatch):
    """PEFT's two names are fixed: a mixture of an old and a new file must not come about."""
    x, new = inputs(), ours(CASES["lora"])
    dk.save_adapter(dk.adapt(Net(), dk.LoRA(r=4), TARGETS), tmp_path, format="peft")
    left = iter(range(at, -1, -1))

    def failing(real):
        def step(*values, **options):
            if next(left, None) == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*values, **options)

        return step

    with monkeypatch.context() as patched:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patched.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(OSError, match="an adapter that was there before may be gone"):
            dk.save_adapter(new, tmp_path, format="peft")
    try:
        loaded = dk.load_adapter(Net(), tmp_path)
    except (FileNotFoundError, dk.AdapterFileError):
        loaded = None
    old = at < 3  # steps: two fsyncs, the unlink, fsync, replace, fsync, replace, fsync
    if old:
        assert relative_error(loaded(x), Net()(x)) == 0.0
    else:
        assert loaded is None or relative_error(loaded(x), new(x)) < 1e-12
    assert not list(tmp_path.glob("*.tmp"))
    dk.save_adapter(new, tmp_path, format="peft")
    assert relative_error(dk.load_adapter(Net(), tmp_path)(x), new(x)) < 1e-12


def test_peft_need_not_be_installed(tmp_path):
    script = f"""
import sys
class NoPeft:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("peft", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPeft())
import torch
from torch import nn
import decomp_kernels as dk
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
model = dk.adapt(base(), dk.DoRA(r=2), ["1"])
torch.nn.init.normal_(model[1].adapters["default"].up)
dk.save_adapter(model, {str(tmp_path)!r}, format="peft")
x = torch.randn(3, 8)
assert torch.equal(dk.load_adapter(base(), {str(tmp_path)!r})(x), model(x))
assert not torch.equal(base()(x), model(x))
print("done", "peft" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["done", "False"], done.stderr
