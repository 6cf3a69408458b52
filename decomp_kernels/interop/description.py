"""What adapter.json says of an adapter, as dataclasses, and the strict reading of it.

    bytes  ->  JSON  ->  checksum  ->  types of every value  ->  Description

Nothing here looks at a model.  Whatever is wrong with the text raises AdapterFileError.
"""

import hashlib
import json
import re
import reprlib
from dataclasses import dataclass
from importlib import metadata
from types import NoneType
from typing import Any

from decomp_kernels.interop.fingerprint import BaseRecord

FORMAT = "decomp_kernels adapter"
VERSION = 1


class AdapterFileError(ValueError):
    """An adapter's files are damaged, or do not fit the model.  Nothing was changed."""


@dataclass(frozen=True)
class Description:
    """One adapter of a model, all but its numbers.

    methods: the distinct (name, options) of its layers.  layers: {module's path: (index into
    methods, the linear under it)}.  modules: {path: class} of the modules trained whole.  biases:
    names of trained biases of the base.  tensors: {key: (dtype, shape)} of the tensor file.
    shared: {key: key of the tensor that stands for it}.  sha256: of the tensor file.

    An adapter that came from PEFT's files, which say nothing of the base, has None for the linears
    and for the classes.
    """

    adapter_name: str
    methods: list[tuple[str, dict[str, Any]]]
    layers: dict[str, tuple[int, BaseRecord | None]]
    modules: dict[str, str | None]
    biases: list[str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    shared: dict[str, str]
    sha256: str

    def key(self, layer: str, tensor: str) -> str:
        """Where the tensor file has this tensor of this layer."""
        key = layer_key(layer, tensor)
        return self.shared.get(key, key)


def layer_key(layer: str, tensor: str) -> str:
    return f"layers.{layer}.{tensor}"


def module_key(module: str, tensor: str) -> str:
    return f"modules.{module}.{tensor}"


def bias_key(name: str) -> str:
    return f"biases.{name}"


def to_text(description: Description) -> str:
    """adapter.json, with a checksum over everything else in it."""
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "package_version": _package_version(),
        "adapter_name": description.adapter_name,
        "methods": [{"name": name, "options": opts} for name, opts in description.methods],
        "layers": {
            name: {"method": index, **({} if base is None else base._asdict())}
            for name, (index, base) in description.layers.items()
        },
        "modules_to_save": description.modules,
        "biases": description.biases,
        "tensors": {
            key: {"dtype": dtype, "shape": shape}
            for key, (dtype, shape) in description.tensors.items()
        },
        "shared": description.shared,
        "sha256": description.sha256,
    }
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1, allow_nan=False)
    # Sizes on one line each; within text a line break is written \n, so this meets lists alone.
    return re.sub(r"\[\n\s*([\d,\s]+?)\n\s*\]", _on_one_line, text) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    return f"[{' '.join(found[1].split())}]"


def from_text(text: bytes) -> Description:
    content = parse_json(text, "adapter.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFileError(
            f'adapter.json must say "format": "{FORMAT}", got {_short(content)}; '
            "give the folder that save_adapter wrote"
        )
    version = content.get("format_version")
    if type(version) is not int or version != VERSION:
        raise AdapterFileError(
            f"format_version must be {VERSION}, which this package reads, got {_short(version)}; "
            "use the version of decomp_kernels that wrote the file, "
            f"{_short(content.get('package_version'))}"
        )
    found = content.pop("checksum", None)
    if found != _checksum(content):
        raise AdapterFileError(
            "adapter.json does not match its own checksum: it is damaged or was edited; "
            "copy it again, or load the base model and save the adapter again"
        )
    return _typed(content)


_BASE_KINDS: dict[str, Any] = {
    "module": str, "shape": list, "dtype": str, "bias": bool, "values": (str, NoneType)
}  # fmt: skip


def _typed(content: dict[str, Any]) -> Description:
    top = _object(
        content, "adapter.json",
        format=str, format_version=int, package_version=str, adapter_name=str, methods=list,
        layers=dict, modules_to_save=dict, biases=list, tensors=dict, shared=dict, sha256=str,
    )  # fmt: skip
    methods = []
    for i, value in enumerate(top["methods"]):
        one = _object(value, f"methods[{i}]", name=str, options=dict)
        methods.append((one["name"], one["options"]))
    layers = {}
    for name, value in top["layers"].items():
        where = f"layers[{_short(name)}]"
        unknown = set(value) == {"method"} if isinstance(value, dict) else False
        one = _object(value, where, method=int, **({} if unknown else _BASE_KINDS))
        index = one.pop("method")
        if not 0 <= index < len(methods):
            raise _wrong(f"{where}.method", f"an index below {len(methods)}", index)
        layers[name] = (index, None if unknown else _base_record(one, where))
    if not layers:
        raise _wrong("layers", "at least one layer", {})
    tensors = {}
    for key, value in top["tensors"].items():
        one = _object(value, f"tensors[{_short(key)}]", dtype=str, shape=list)
        tensors[key] = (one["dtype"], _sizes(one["shape"], f"tensors[{_short(key)}].shape"))
    for what in ("modules_to_save", "shared"):
        for key, value in top[what].items():
            if type(value) is not str and not (what == "modules_to_save" and value is None):
                raise _wrong(f"{what}[{_short(key)}]", "text", value)
    for value in top["biases"]:
        if type(value) is not str:
            raise _wrong("biases", "a list of names", top["biases"])
    if not re.fullmatch("[0-9a-f]{64}", top["sha256"]):
        raise _wrong("sha256", "64 hexadecimal digits", top["sha256"])
    return Description(
        top["adapter_name"], methods, layers, top["modules_to_save"], top["biases"], tensors,
        top["shared"], top["sha256"],
    )  # fmt: skip


def _base_record(one: dict[str, Any], where: str) -> BaseRecord:
    shape = _sizes(one.pop("shape"), f"{where}.shape")
    if len(shape) != 2:
        raise _wrong(f"{where}.shape", "two sizes", list(shape))
    return BaseRecord(shape=(shape[0], shape[1]), **one)


def parse_json(text: bytes, file: str) -> Any:
    """Strict JSON in UTF-8: no name twice in one object, no NaN.  Raises AdapterFileError."""
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_no_pair_twice, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:  # a RecursionError: lists in lists in lists
        raise AdapterFileError(
            f"{file} must be JSON in UTF-8, and it is not ({str(error)[:200]}); "
            "it is damaged: copy it again, or save the adapter again"
        ) from None


def _no_pair_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _object(value: Any, where: str, **kinds: Any) -> dict[str, Any]:
    """The dict ``value``, if it has exactly these entries, each of its type."""
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    if set(value) != set(kinds):
        raise _wrong(where, f"an object with {', '.join(kinds)}", value)
    for key, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if type(value[key]) not in allowed:  # True is no int here
            names = " or ".join(_JSON_NAMES[one] for one in allowed)
            raise _wrong(f"{where}: {key}", names, value[key])
    return dict(value)


_JSON_NAMES = {str: "text", int: "a whole number", bool: "true or false", list: "a list",
               dict: "an object", NoneType: "null"}  # fmt: skip


def _sizes(value: list[Any], where: str) -> tuple[int, ...]:
    if not all(type(size) is int and 0 <= size < 2**31 for size in value):
        raise _wrong(where, "a list of sizes", value)
    return tuple(value)


def _wrong(where: str, must: str, got: Any) -> AdapterFileError:
    return AdapterFileError(
        f"{where} must be {must}, got {_short(got)}; adapter.json is damaged or was edited: "
        "save the adapter again"
    )


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _checksum(content: dict[str, Any]) -> str:
    """sha256 over the content in one fixed spelling, so that white space is free."""
    spelled = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()


def _package_version() -> str:
    try:
        return metadata.version("decomp_kernels")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "unknown"
