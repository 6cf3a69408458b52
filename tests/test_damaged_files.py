"""10,000 damaged pairs of files: each is refused with a clear text, or is what was saved.

Half are damaged as disks and networks do it, and meet the checksums.  Half are signed again, as
somebody would who means harm or edits by hand, and meet every check behind the checksums.
"""

import copy
import hashlib
import json
import random
import struct

import pytest
import torch
from snapshots import Snapshot
from test_files import LAYERS, Net, inputs, train

import decomp_kernels as dk
from decomp_kernels.interop import description as descriptions
from decomp_kernels.interop.tensor_file import decode

RAW, SIGNED = 5000, 5000
METHODS = [
    dk.LoRA(r=2), dk.VeRA(r=2), dk.DoRA(r=2), dk.LoRADash(r=2, n_directions=2),
    dk.Sparse(density=0.05),
]  # fmt: skip


class Pair:
    """A folder with an adapter, its two files in memory, and a model to load it into."""

    def __init__(self, folder, method):
        self.folder = folder
        model = dk.adapt(Net(), method, LAYERS, modules_to_save=["norm"], bias="all")
        dk.save_adapter(train(model), folder)
        self.output = model(inputs())
        (self.tensor_path,) = folder.glob("*.safetensors")
        self.json_path = folder / "adapter.json"
        self.text, self.data = self.json_path.read_bytes(), self.tensor_path.read_bytes()
        self.content = json.loads(self.text)
        self.fresh()

    def fresh(self):
        self.base = Net().eval()
        self.snapshot = Snapshot(self.base, inputs())

    def load(self, text, data, **options):
        """True where it was taken; where it was refused nothing may have changed."""
        path = self.tensor_path
        try:
            sha256 = json.loads(text)["sha256"]
            if isinstance(sha256, str) and len(sha256) == 64 and sha256.isalnum():
                path = self.folder / f"adapter-{sha256[:16]}.safetensors"
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        self.json_path.write_bytes(text)
        path.write_bytes(data)
        try:
            dk.load_adapter(self.base, self.folder, **options)
        except ValueError as error:  # AdapterFileError, or a name that cannot be an adapter's
            assert len(str(error)) > 20
            assert "\n" not in str(error)[:40]
            self.snapshot.assert_unchanged()
            return False
        finally:
            if path != self.tensor_path:
                path.unlink()
        return True


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def pair(request, tmp_path):
    return Pair(tmp_path, request.param)


def damage(rng, data):
    """Bytes as a bad disk, a broken copy or a wrong header leave them."""
    data = bytearray(data)
    kind = rng.randrange(8)
    at = rng.randrange(len(data))
    if kind == 0:  # flipped bits
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # cut short
        del data[at:]
    elif kind == 2:  # a part is missing
        del data[at : at + rng.randrange(1, 64)]
    elif kind == 3:  # a part comes twice
        data[at:at] = data[at : at + rng.randrange(1, 64)]
    elif kind == 4:  # overwritten
        end = min(len(data), at + rng.randrange(1, 64))
        data[at:end] = rng.randbytes(end - at)
    elif kind == 5:  # another length of the header, up to the largest
        value = rng.choice([0, 1, 7, len(data), 2**31, 2**32 - 1, 2**63, 2**64 - 1, at])
        data[:8] = struct.pack("<Q", value)
    elif kind == 6:  # more at the end
        data += rng.randbytes(rng.randrange(1, 64))
    else:  # zeros, as after a crash of the file system
        data[at:] = bytes(len(data) - at)
    return bytes(data)


def test_damaged_pairs(pair):
    rng = random.Random(1)
    taken = 0
    for number in range(RAW // len(METHODS)):
        text, data = pair.text, pair.data
        if number % 2:
            text = damage(rng, text)
        else:
            data = damage(rng, data)
        same = data == pair.data and _content(text) == pair.content
        if pair.load(text, data):
            assert same, "another adapter than the one that was saved was taken"
            assert torch.equal(pair.base.eval()(inputs()), pair.output)
            pair.fresh()
            taken += 1
        else:
            assert (text, data) != (pair.text, pair.data)
    assert taken <= RAW // 20  # white space, and damage that writes what was there


def _content(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e308,
    1e-320, "", "0", "r", "lora", "vera", "ssb", "pissa", "float64", "int64", "float32; import os",
    "../../../etc/passwd", "/etc/passwd", "a\0b", "first", "norm", "norm.weight", "head", "\ud800",
    "first.adapters.default", "__class__", "forward", "x" * 10000, "${HOME}", "layers.first.down",
    [], [0], [-1], [1, 2, 3], [2**40, 2**40], ["first"], {}, {"r": 2}, {"first": "second"},
    _nested(50),
]  # fmt: skip


def mutate(rng, value):
    """``value`` with one place in it changed: a type, a name, an entry, a size."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    where, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind <= 2:
        where[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif kind == 3:
        del where[key]
    elif kind == 4 and isinstance(where, dict):  # under another name
        name = rng.choice([v for v in ODD_VALUES if isinstance(v, str)])
        where[name] = where.pop(key)
    else:  # the value of another place
        other, other_key = rng.choice(places)
        where[key] = copy.deepcopy(other[other_key])
    return value


def _places(value):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def signed(content):
    """adapter.json with the checksum that its content asks for."""
    if isinstance(content, dict):
        content.pop("checksum", None)
        content["checksum"] = descriptions._checksum(content)
    return json.dumps(content).encode()


def split(data):
    """(header, tensors) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def odd_numbers(rng, data):
    """Some elements become NaN, infinity, or anything."""
    header, tensors = split(data)
    tensors = bytearray(tensors)
    for _ in range(rng.choice([1, 4])):
        at = 4 * rng.randrange(len(tensors) // 4)
        odd = rng.choice([struct.pack("<f", float(v)) for v in ("nan", "inf", "-inf", "3e38")])
        tensors[at : at + 4] = rng.choice([odd, rng.randbytes(4)])
    return joined(header, bytes(tensors))


def test_damaged_pairs_with_right_checksums(pair):
    rng = random.Random(2)
    taken = 0
    for number in range(SIGNED // len(METHODS)):
        content, data = pair.content, pair.data
        if number % 3 == 0:
            data = odd_numbers(rng, data) if number % 2 else damage(rng, data)
        elif number % 3 == 1:
            header, tensors = split(data)
            data = joined(mutate(rng, header), tensors)
        else:
            content = mutate(rng, content)
        if data is not pair.data:
            content = {**content, "sha256": hashlib.sha256(data).hexdigest()}
        if pair.load(signed(content), data, allow_other_base=bool(number % 2)):
            assert_whole(pair.base)
            pair.fresh()
            taken += 1
    assert 0 < taken < SIGNED // len(METHODS) // 2  # another dropout is a good adapter, say


def assert_whole(model):
    """What was taken is a whole adapter: on every layer, finite, and it runs."""
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.first.active_adapter == model.second.active_adapter is not None
    assert model.eval()(inputs()).shape == (7, 5)


def test_bytes_that_are_no_tensors():
    """The reader of the tensor file alone, without a checksum before it."""
    rng = random.Random(3)
    good = joined({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, bytes(16))
    assert decode(good)["a"].shape == (2, 2)
    for _ in range(5000):
        data = damage(rng, good)
        try:
            tensors = decode(data)
        except dk.AdapterFileError:
            continue
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON in UTF-8"),
        (b"\xff\xfe", "must be JSON in UTF-8"),
        (b"[" * 100000, "must be JSON in UTF-8"),
        (b'{"a": 1, "a": 2}', "a name stands twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": ' + b"9" * 10000 + b"}", "must be JSON in UTF-8"),
        (b"[]", 'must say "format": "decomp_kernels adapter", got \\[\\]'),
        (b'{"peft_type": "LORA"}', 'must say "format": "decomp_kernels adapter"'),
        (b'{"format": "decomp_kernels adapter", "format_version": 2, "package_version": "9.1"}',
         "format_version must be 1, which this package reads, got 2; .*'9.1'"),
        (b'{"format": "decomp_kernels adapter", "format_version": true}', "got True"),
        (b'{"format": "decomp_kernels adapter", "format_version": 1}', "its own checksum"),
    ],
    ids=range(11),
)  # fmt: skip
def test_texts_that_are_no_description(text, message):
    with pytest.raises(dk.AdapterFileError, match=message):
        descriptions.from_text(text)


def _set(content, path, value):
    for key in path[:-1]:
        content = content[key]
    if value is KeyError:
        del content[path[-1]]
    else:
        content[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["adapter_name"], "../up", "name must be 1 to 64 letters, digits, _ or -, got '../up'"),
        (["adapter_name"], "keys", "cannot be named 'keys'"),
        (["adapter_name"], 3, "adapter.json: adapter_name must be text, got 3"),
        (["methods"], {}, "adapter.json: methods must be a list, got {}"),
        (["methods"], [], r"layers\['first'\].method must be an index below 0, got 0"),
        (["methods", 0, "name"], "lorra", "method must be one of .*lora.*got 'lorra'"),
        (["methods", 0, "name"], "__init__", "method must be one of"),
        (["methods", 0, "options", "r"], 0, "options of lora are wrong: r must be at least 1"),
        (["methods", 0, "options", "r"], "2", r"LoRA\(r=\.\.\.\) must be int, got '2'"),
        (["methods", 0, "options", "r"], [2], r"LoRA\(r=\.\.\.\) must be int, got \(2,\)"),
        (["methods", 0, "options", "r"], True, r"LoRA\(r=\.\.\.\) must be int, got True"),
        (["methods", 0, "options", "r"], 3, "down must have shape \\(3, 16\\), got \\(2, 16\\)"),
        (["methods", 0, "options", "r"], 10**30, "do not fit first"),
        (["methods", 0, "options", "rank"], 2, "LoRA has no option 'rank'"),
        (["methods", 0, "options", "impl"], "cuda", "options of lora are wrong: impl"),
        (["layers"], {}, "layers must be at least one layer"),
        (["layers", "third"], {"method": 0, "module": "Linear", "shape": [2, 2], "bias": True,
                               "dtype": "float32", "values": None},
         "an adapter for 'third', which the model does not have; .*Its linears are: first, second"),
        (["layers", "first", "method"], -1, "must be an index below 1, got -1"),
        (["layers", "first", "shape"], [16, 24], r"weight of first must have shape \(16, 24\)"),
        (["layers", "first", "shape"], [24], "shape must be two sizes, got"),
        (["layers", "first", "shape"], [24, 16.0], "shape must be a list of sizes, got"),
        (["layers", "first", "shape"], [24, 2**40], "shape must be a list of sizes, got"),
        (["layers", "first", "dtype"], "bfloat16", "weight was bfloat16 and is float32"),
        (["layers", "first", "module"], "Conv1D", "was a Conv1D and is a Linear"),
        (["layers", "first", "values"], "0" * 64, "its weight or bias has other values"),
        (["layers", "first", "values"], None, "does not say what its base was"),
        (["layers", "first", "bias"], None, "bias must be true or false, got None"),
        (["layers", "first", "extra"], 1, "must be an object with method, module, shape"),
        (["modules_to_save", "../norm"], "BatchNorm1d", "a trained copy of '../norm'"),
        (["modules_to_save", ""], "Net", "a trained copy of ''"),
        (["modules_to_save", "norm"], "Linear", "'norm' must be a Linear .* got a BatchNorm1d"),
        (["modules_to_save", "norm"], ["BatchNorm1d"], r"modules_to_save\['norm'\] must be text"),
        (["modules_to_save", "first"], "Linear", "first cannot take .*: it is trained whole"),
        (["biases"], ["norm.weight"], "a trained bias 'norm.weight', which the model does not"),
        (["biases"], [3], "biases must be a list of names"),
        (["biases", 0], "no.bias", "a trained bias 'no.bias'"),
        (["tensors", "layers.first.down", "shape"], [16, 2], "must have shape"),
        (["tensors", "layers.first.down", "shape"], [2, -16], "must be a list of sizes"),
        (["tensors", "layers.first.down", "dtype"], "int64", "must be float32 on this model"),
        (["tensors", "layers.first.down", "dtype"], "float64", "must be float32 on this model"),
        (["tensors", "layers.first.down"], KeyError, "the file lacks 'layers.first.down'"),
        (["tensors", "layers.first.x"], {"dtype": "float32", "shape": []}, "has a superfluous"),
        (["shared", "layers.first.down"], "layers.second.down", "lacks|superfluous|two tensors"),
        (["shared", "nothing"], "layers.first.down", "shares 'nothing', which is no tensor"),
        (["shared", "layers.first.x"], "layers.first.down", "which are no tensors of its layers"),
        (["sha256"], "../../../etc/passwd", "sha256 must be 64 hexadecimal digits"),
        (["sha256"], "0" * 64, "must hold adapter-0000000000000000.safetensors"),
        (["extra"], 1, "adapter.json must be an object with format"),
    ],
)  # fmt: skip
def test_a_description_that_says_something_wrong(path, value, message, tmp_path):
    pair = Pair(tmp_path, dk.LoRA(r=2))
    content = copy.deepcopy(pair.content)
    _set(content, path, value)
    pair.json_path.write_bytes(signed(content))
    with pytest.raises(ValueError, match=message):
        dk.load_adapter(pair.base, tmp_path)
    pair.snapshot.assert_unchanged()


def test_two_tensors_that_the_file_makes_one(tmp_path):
    """Trained as one Parameter they would follow each other for good."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

    dk.save_adapter(dk.adapt(model(), dk.LoRA(r=2)), tmp_path)
    content = json.loads((tmp_path / "adapter.json").read_text())
    del content["tensors"]["layers.1.down"]
    content["shared"] = {"layers.1.down": "layers.0.down"}
    (tmp_path / "adapter.json").write_bytes(signed(content))
    with pytest.raises(dk.AdapterFileError, match=r"layers.1.down and layers.0.down must be two"):
        dk.load_adapter(model(), tmp_path)


def _tensor(header, key, **changes):
    header[key] = {**header[key], **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("layers.first.down"), "no safetensors file"),  # a gap in the data
        (lambda h: _tensor(h, "layers.first.down", shape=[16, 2]), "must hold 'layers.first.down'"),
        (lambda h: _tensor(h, "layers.first.down", dtype="I32"), "must hold 'layers.first.down'"),
        (lambda h: _tensor(h, "layers.first.down", dtype="F4"), "safetensors|must be of type"),
        (lambda h: _tensor(h, "layers.first.down", shape=[2**40, 2**40]), "no safetensors file"),
        (lambda h: h.update({"../x": h.pop("layers.first.down")}), "must hold '../x' as absent"),
    ],
    ids=range(6),
)
def test_tensors_that_are_not_as_described(change, message, tmp_path):
    pair = Pair(tmp_path, dk.LoRA(r=2))
    header, tensors = split(pair.data)
    change(header)
    data = joined(header, tensors)
    content = {**pair.content, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(dk.AdapterFileError, match=message):
        dk.load_adapter(_write(pair, content, data), tmp_path)
    pair.snapshot.assert_unchanged()


def _write(pair, content, data):
    pair.json_path.write_bytes(signed(content))
    (pair.folder / f"adapter-{content['sha256'][:16]}.safetensors").write_bytes(data)
    return pair.base


def test_numbers_that_are_not_finite(tmp_path):
    pair = Pair(tmp_path, dk.LoRA(r=2))
    header, tensors = split(pair.data)
    at = header["layers.second.up"]["data_offsets"][0]
    tensors = tensors[:at] + struct.pack("<f", float("nan")) + tensors[at + 4 :]
    data = joined(header, tensors)
    content = {**pair.content, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(dk.AdapterFileError, match=r"layers.second.up must be finite, and as float"):
        dk.load_adapter(_write(pair, content, data), tmp_path)
    pair.snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("rows", 24, "rows must be from 0 to 23"),
        ("rows", -1, "rows must be from 0 to 23"),
        ("cols", 2**40, "cols must be from 0 to 15"),
        ("both", 0, "rows and cols must name no place twice"),
    ],
)
def test_places_that_are_none(tensor, value, message, tmp_path):
    """Indices from a file would be read and written with."""
    pair = Pair(tmp_path, dk.Sparse(density=0.05))
    header, tensors = split(pair.data)
    for name in ("rows", "cols") if tensor == "both" else (tensor,):
        at = header[f"layers.first.{name}"]["data_offsets"][0]
        for place in range(2 if tensor == "both" else 1):
            start = at + 8 * place
            tensors = tensors[:start] + struct.pack("<q", value) + tensors[start + 8 :]
    data = joined(header, tensors)
    content = {**pair.content, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(dk.AdapterFileError, match=f"tensors for first cannot be right: {message}"):
        dk.load_adapter(_write(pair, content, data), tmp_path)
    pair.snapshot.assert_unchanged()


def test_files_of_a_size_that_no_adapter_has(tmp_path):
    """Said before they are read: the memory may not hold them."""
    pair = Pair(tmp_path, dk.LoRA(r=2))
    with pair.tensor_path.open("r+b") as file:
        file.truncate(2**40)  # it takes no room on the disk
    with pytest.raises(dk.AdapterFileError, match="must have at most .* bytes, got 1099511627776"):
        dk.load_adapter(pair.base, tmp_path)
    with pair.json_path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(dk.AdapterFileError, match="must be JSON of at most"):
        dk.load_adapter(pair.base, tmp_path)
    pair.snapshot.assert_unchanged()
