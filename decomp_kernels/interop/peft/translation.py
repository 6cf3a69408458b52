"""PEFT's configuration and tensors  <->  our Description and tensors, without PEFT.

base_model.model.<path>.<tensor>              a tensor of the adapter on this layer
base_model.model.<path>.<tensor>              the state dict of a module that is trained whole
base_model.model.<path>[.base_layer].bias     a bias of the base that is trained
base_model.<tensor>                           what all layers share: VeRA's projections
"""

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from decomp_kernels.interop.description import (
    AdapterFileError,
    Description,
    bias_key,
    layer_key,
    module_key,
)
from decomp_kernels.interop.fitting import made_method
from decomp_kernels.interop.peft import particulars
from decomp_kernels.interop.peft.configuration import (
    VERSION,
    fields_of,
    forms_of,
    method_of,
    options_of,
)
from decomp_kernels.interop.peft.folder import CONFIG, TENSORS
from decomp_kernels.interop.peft.names import BaseFacts, named
from decomp_kernels.interop.tensor_file import dtype_name
from decomp_kernels.methods.vera import VeRA
from decomp_kernels.peft_form import PeftForm

_PREFIX = "base_model.model."

Shapes = dict[str, tuple[int, int]]


def _fault_of_the_file(
    read: Callable[..., tuple[Description, dict[str, Tensor]]],
) -> Callable[..., tuple[Description, dict[str, Tensor]]]:
    """Whatever a value of a wrong kind leads to is an error of the file."""
    kinds = (
        TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError,
        re.error,
    )  # fmt: skip

    @wraps(read)
    def checked(*values: Any, **options: Any) -> tuple[Description, dict[str, Tensor]]:
        try:
            return read(*values, **options)
        except AdapterFileError:
            raise
        except kinds as error:
            words = f"{type(error).__name__}: {error}"[:300]
            raise AdapterFileError(
                f"{CONFIG} and {TENSORS} must be as PEFT writes them, and they are not ({words}); "
                "they are damaged or were edited: save the adapter again with PEFT"
            ) from None

    return checked


@_fault_of_the_file
def from_peft(
    config: dict[str, Any], file: dict[str, Tensor], shapes: Shapes | None = None
) -> tuple[Description, dict[str, Tensor]]:
    """The adapter in the terms of our own format; the base is not known.

    shapes: (N, K) of the model's linears, for VeRA saved without its projections.  Raises
    AdapterFileError where the file is wrong, or of a variant that is not computed here.
    """
    forms = forms_of(config)
    found = _sorted_keys(file, forms, config)
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    methods: list[tuple[str, dict[str, Any]]] = []
    layers: dict[str, tuple[int, None]] = {}
    if found.shared_by_all is None and any(_shares(form) for form in forms.values()):
        found.shared_by_all = _projections(config, list(found.layers), shapes)
    for path, theirs in found.layers.items():
        name = method_of(forms, config, path)
        options = options_of(name, forms[name], config, path)
        particulars.read_layer(forms[name].peft_type, config, path, options, theirs)
        ours = _ours(forms[name], theirs)
        tensors |= {layer_key(path, tensor): value for tensor, value in ours.items()}
        if (name, options) not in methods:
            made_method(name, options)
            methods.append((name, options))
        layers[path] = (methods.index((name, options)), None)
        for tensor, value in (found.shared_by_all or {}).items():
            key, holder = layer_key(path, tensor), layer_key(next(iter(layers)), tensor)
            if key == holder:
                tensors[key] = value
            else:
                shared[key] = holder
    if not layers:
        raise AdapterFileError(f"{TENSORS} must hold an adapter of at least one layer, got none")
    modules: dict[str, str | None] = dict.fromkeys(path for path, _ in found.modules)
    tensors |= {module_key(*key): value for key, value in found.modules.items()}
    tensors |= {bias_key(name): value for name, value in found.biases.items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterFileError(
                f"{key} must be finite, and in {TENSORS} it holds NaN or infinity; "
                "it is damaged: copy it again"
            )
    table = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    described = Description(
        "default", methods, dict(layers), modules, sorted(found.biases), table, shared, ""
    )
    return described, tensors


def to_peft(
    description: Description, tensors: dict[str, Tensor], facts: BaseFacts | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files say.  facts: of the base, where it is at hand.

    Raises ValueError where PEFT has no such adapter.
    """
    made = [made_method(name, options) for name, options in description.methods]
    methods = {path: made[index] for path, (index, _) in description.layers.items()}
    bases = {path: base for path, (_, base) in description.layers.items()}
    without_bias = {path for path, base in bases.items() if base is not None and not base.bias}
    form, config = fields_of(methods, without_bias)
    particulars.write_fields(config)
    config |= named(description, facts)
    config |= {"inference_mode": True, "peft_version": VERSION}
    config |= _bias_field(form, description)
    config |= _layout_field(form, methods, description)
    theirs: dict[str, Tensor] = {}
    common: dict[str, str] = {}  # our key of what all layers share, by PEFT's
    for path, method in methods.items():
        own: Any = type(method).peft_form
        parts: dict[str, list[Tensor]] = {}
        for name, tensor in own.tensors.items():
            key = description.key(path, name)
            if key not in tensors:
                continue
            prefix = "base_model." if tensor.shared else f"{_PREFIX}{path}."
            if tensor.shared and common.setdefault(tensor.path, key) != key:
                raise ValueError(
                    f"PEFT has one {tensor.file_key()} for all layers, and {path} has another "
                    "one than the first; use the format of decomp_kernels"
                )
            parts.setdefault(prefix + tensor.file_key(), []).append(tensor.theirs(tensors[key]))
        theirs |= {
            key: torch.cat(some) if len(some) > 1 else some[0] for key, some in parts.items()
        }
    for path in description.modules:
        inside = module_key(path, "")
        for key, value in tensors.items():
            if key.startswith(inside):
                theirs[f"{_PREFIX}{path}.{key.removeprefix(inside)}"] = value
    for name in description.biases:
        path, _, last = name.rpartition(".")
        own_name = f"{path}.base_layer.{last}" if path in description.layers else name
        theirs[_PREFIX + own_name] = tensors[bias_key(name)]
    return config, theirs


def _bias_field(form: PeftForm, description: Description) -> dict[str, str]:
    if not description.biases:
        return {"bias": "none"} if form.bias_only else {}
    if not form.bias_only:
        raise ValueError(
            f"PEFT's {form.config} trains no biases, and the adapter has some, such as "
            f"{description.biases[0]}; use the format of decomp_kernels"
        )
    outside = [n for n in description.biases if n.rpartition(".")[0] not in description.layers]
    return {"bias": "all" if outside else form.bias_only}


def _layout_field(
    form: PeftForm, methods: dict[str, Any], description: Description
) -> dict[str, bool]:
    """What depends on the linear under a layer, where that is known."""
    found = {}
    for path, (_, base) in description.layers.items():
        conv1d = base is not None and base.module == "Conv1D"
        if conv1d and not form.conv1d:
            raise ValueError(
                f"PEFT's {form.config} does not fit a Conv1D, and {path} is one; use the format "
                "of decomp_kernels"
            )
        if conv1d:
            found = {"fan_in_fan_out": True}
    return found


class _Found:
    """The tensors of a file, sorted by what they belong to."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.modules: dict[tuple[str, str], Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.shared_by_all: dict[str, Tensor] | None = None


def _sorted_keys(
    tensors: dict[str, Tensor], forms: dict[str, PeftForm], config: dict[str, Any]
) -> _Found:
    names = {t.file_key() for f in forms.values() for t in f.tensors.values() if not t.shared}
    shared = {
        f"base_model.{t.file_key()}": name
        for form in forms.values()
        for name, t in form.tensors.items()
        if t.shared
    }
    whole = tuple(config.get("modules_to_save") or ())
    biases = config.get("bias", "none")
    found = _Found()
    for key, tensor in sorted(tensors.items()):  # decoding has no order of its own
        rest = key.removeprefix(_PREFIX)
        of_layer = next((name for name in names if rest.endswith(f".{name}")), None)
        module = _trained_whole(rest, whole)
        if key in shared:
            found.shared_by_all = {**(found.shared_by_all or {}), shared[key]: tensor}
        elif rest == key:
            _unknown(key)
        elif of_layer is not None:
            found.layers.setdefault(rest.removesuffix(f".{of_layer}"), {})[of_layer] = tensor
        elif biases == "all" and rest.endswith((".original_module.bias", ".modules_to_save.bias")):
            continue  # with bias="all" PEFT writes those of modules_to_save three times
        elif biases != "none" and rest.endswith(".base_layer.bias"):
            found.biases[rest.removesuffix(".base_layer.bias") + ".bias"] = tensor
        elif module is not None:
            found.modules[module, rest.removeprefix(f"{module}.")] = tensor
        elif biases == "all" and rest.endswith(".bias"):
            found.biases[rest] = tensor
        else:
            _unknown(key)
    return found


def _trained_whole(rest: str, names: tuple[str, ...]) -> str | None:
    """The outermost module around this tensor that modules_to_save matches, by PEFT's rule."""
    parts = rest.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]
    return next((path for path in paths if names and path.endswith(names)), None)


def _unknown(key: str) -> None:
    raise AdapterFileError(
        f"{TENSORS} has {key!r}, which is no tensor of this method on a linear, no bias and none "
        "of modules_to_save; decomp_kernels adapts linears only (save_embedding_layers=False "
        "leaves embeddings out): load the adapter with PEFT itself"
    )


def _ours(form: PeftForm, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of one layer, checked to be PEFT's again when they are turned back."""
    found: dict[str, Tensor] = {}
    for key, value in theirs.items():
        parts = {n: t for n, t in form.tensors.items() if t.file_key() == key}
        found |= {name: tensor.ours(value) for name, tensor in parts.items()}
        back = torch.cat([tensor.theirs(found[name]) for name, tensor in parts.items()])
        if back.shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(value.shape)}")
    return found


def _shares(form: PeftForm) -> bool:
    return any(tensor.shared for tensor in form.tensors.values())


def _projections(
    config: dict[str, Any], layers: list[str], shapes: Shapes | None
) -> dict[str, Tensor]:
    """VeRA's, from their key, as PEFT makes them where they were not saved."""
    if config.get("save_projection", True):
        raise AdapterFileError(f"{TENSORS} must hold base_model.vera_A and base_model.vera_B")
    if shapes is None:
        raise AdapterFileError(
            "save_projection=False leaves VeRA's projections out of the file, and their shapes "
            "are those of the base: load the adapter on the base model (convert: give --base)"
        )
    sizes = [shapes[path] for path in layers if path in shapes]
    method = VeRA(r=config["r"], projection_prng_key=config["projection_prng_key"])
    made = method.share(sizes, torch.float32, torch.device("cpu"))
    return {name: tensor.data for name, tensor in made.items()}
