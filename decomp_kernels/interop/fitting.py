"""A described adapter against a model:  Description, model  ->  blank adapters, or why not.

Blank adapters are made on the meta device by the methods themselves: their names, shapes and
sharing are what the file must have, and no random number is drawn and nothing is decomposed for
values that come from the file.  Nothing here changes the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop.description import (
    AdapterFileError,
    Description,
    bias_key,
    layer_key,
    module_key,
)
from decomp_kernels.interop.fingerprint import base_record, difference
from decomp_kernels.interop.tensor_file import FLOATING, dtype_name
from decomp_kernels.linear import (
    Decomposed,
    DecomposedLinear,
    adapted_layers,
    decomposed_class,
    stand_in,
)
from decomp_kernels.making import make_shared
from decomp_kernels.methods.base import METHODS, Adapter, Method
from decomp_kernels.saved_modules import TrainedCopy, copy_of, trained_copies
from decomp_kernels.targets import why_not


@dataclass
class Place:
    """What one tensor of the file is for: its shape, and the dtypes that can be used as they are.

    convert_to is what other dtypes become, where the base may be another than the file's.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    convert_to: torch.dtype


@dataclass
class Fitted:
    """Everything that loading will put into the model, but for the values."""

    layers: dict[str, Any]  # stand-ins, or the adapted modules themselves
    blanks: dict[str, Adapter]
    copies: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]
    places: dict[str, Place]  # by key of the tensor file


def fit(model: nn.Module, description: Description, allow_other_base: bool) -> Fitted:
    """Raises AdapterFileError where the description is wrong or is of another model."""
    methods = [_method(name, options) for name, options in description.methods]
    copies = _copies(model, description)
    layers = _layers(model, description)
    biases = _biases(model, description)
    _check_base(layers, description, allow_other_base)
    blanks = _blanks(layers, methods, description)
    places = _layer_places(layers, blanks, description)
    for path, module in copies.items():
        for name, tensor in module.state_dict().items():
            places[module_key(path, name)] = _place(tensor)
    places |= {bias_key(name): _place(tensor) for name, tensor in biases.items()}
    _check_tensors(places, description, allow_other_base)
    return Fitted(layers, blanks, copies, biases, places)


def _method(name: str, options: dict[str, Any]) -> Method:
    if name not in METHODS:
        raise AdapterFileError(
            f"the file's method must be one of {', '.join(sorted(METHODS))}, got {name!r}; "
            "use the version of decomp_kernels that wrote the file"
        )
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    try:
        cls: Any = METHODS[name]
        return cls(**tuples)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"the file's options of {name} are wrong: {error}") from None


def _layers(model: nn.Module, description: Description) -> dict[str, Any]:
    """Stand-ins for the plain linears that the file names; adapted ones as they are."""
    modules = dict(model.named_modules())
    inside = tuple(f"{path}." for path in (*description.modules, *trained_copies(model)))
    found: dict[str, Any] = {}
    owners = {id(layer.weight): path for path, layer in adapted_layers(model).items()}
    for path, (_, base) in description.layers.items():
        module = modules.get(path)
        if module is None or ".adapters." in f".{path}":
            raise AdapterFileError(
                f"the file has an adapter for {path!r}, which the model does not have; "
                f"it must be a model like the one it was saved from. {_linears(modules)}"
            )
        cls: Any = type(module) if isinstance(module, Decomposed) else decomposed_class(module)
        reason = None if path == "" and cls else why_not(model, path, module, cls, owners)
        if path.startswith(inside) or path in description.modules:
            reason = "it is trained whole (modules_to_save), or part of such a module"
        if reason is not None:
            raise AdapterFileError(
                f"{path or 'the model'} cannot take the file's adapter: {reason}"
            )
        layer = module if isinstance(module, Decomposed) else stand_in(module, cls)
        weight = layer.base_weight()
        if tuple(weight.shape) != base.shape:
            raise AdapterFileError(
                f"the weight of {path or 'the model'} must have shape {base.shape}, "
                f"(out_features, in_features), for the file's adapter, got {tuple(weight.shape)}; "
                "load it into the model it was trained on"
            )
        if weight.device.type == "meta":
            raise AdapterFileError(
                f"{path or 'the model'} must have its weight before an adapter is loaded, and it "
                "is on the meta device; load the base weights first"
            )
        owners[id(layer.weight)] = path
        found[path] = layer
    return found


def _check_base(layers: dict[str, Any], description: Description, allowed: bool) -> None:
    if allowed:
        return
    different = {}
    for path, (_, saved) in description.layers.items():
        trained = f"{path}.bias".lstrip(".") in description.biases
        what = difference(saved, base_record(layers[path], bias_is_trained=trained))
        if what is not None:
            different[path] = what
    if different:
        path, what = next(iter(different.items()))
        raise AdapterFileError(
            f"the adapter was trained on another base: {len(different)} of {len(layers)} layers "
            f"differ, first {path or 'the model'}: {what}; load the base it was trained on, in "
            "the same dtype, or pass allow_other_base=True to use this one"
        )


def _blanks(
    layers: dict[str, Any], methods: list[Method], description: Description
) -> dict[str, Adapter]:
    together: dict[str, set[str]] = {path: set() for path in layers}  # what each layer shares
    for key, holder in description.shared.items():
        together[_layer_of(key, layers)].add(holder)
        together[_layer_of(holder, layers)].add(holder)
    groups: dict[Any, dict[str, Any]] = {}
    for path, layer in layers.items():
        index = description.layers[path][0]
        groups.setdefault((index, frozenset(together[path]) or path), {})[path] = _empty(layer)
    made: dict[str, Adapter] = {}
    for (index, _), members in groups.items():
        method, path = methods[index], next(iter(members))
        try:
            shared = make_shared(dict.fromkeys(members, method), members)[repr(method)]
            for path, empty in members.items():
                made[path] = empty.make_adapter(method, path, None, shared)
        except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
            raise AdapterFileError(
                f"the file's options of {method.name} do not fit {path or 'the model'}: {error}"
            ) from None
    return {path: made[path] for path in layers}


def _layer_of(key: str, layers: dict[str, Any]) -> str:
    prefix, _, path = key.partition(".")
    while path and path not in layers:
        path = path.rpartition(".")[0]
    if prefix != "layers" or path not in layers:
        raise AdapterFileError(
            f"the file shares {key!r}, which is no tensor of its layers; it is damaged: "
            "save the adapter again"
        )
    return path


def _empty(layer: Any) -> Any:
    """A stand-in whose weight [out, in] and bias have no values."""
    on_meta = nn.Module().train(layer.training)
    for name, tensor in (("weight", layer.base_weight()), ("bias", layer.bias)):
        value = None
        if tensor is not None:
            value = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        on_meta.register_parameter(name, value)
    return stand_in(on_meta, DecomposedLinear)


def _layer_places(
    layers: dict[str, Any], blanks: dict[str, Adapter], description: Description
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    made_as: dict[str, Tensor] = {}  # the blank tensor behind each key
    for path, blank in blanks.items():
        weight = layers[path].base_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        for name, tensor in blank.state_dict(keep_vars=True).items():
            own = layer_key(path, name)
            key = description.key(path, name)
            if made_as.setdefault(key, tensor) is not tensor:
                raise AdapterFileError(
                    f"{own} and {key} must be two tensors with this method, and in the file they "
                    "are one; it is damaged: save the adapter again"
                )
            dtypes = (weight.dtype, wide) if tensor.is_floating_point() else (tensor.dtype,)
            place = Place(tuple(tensor.shape), dtypes, weight.device, tensor.dtype)
            if places.setdefault(key, place).device != place.device:
                raise AdapterFileError(
                    f"{own} and {key} are one tensor, and their layers are on {place.device} and "
                    f"{places[key].device}; move the model to one device first"
                )
    expected = {layer_key(p, n) for p, blank in blanks.items() for n in blank.state_dict()}
    for key, holder in description.shared.items():
        if key not in expected or holder not in expected or holder in description.shared:
            raise AdapterFileError(
                f"the file says that {key!r} is stored as {holder!r}, which are no tensors of its "
                "layers; it is damaged: save the adapter again"
            )
    return places


def _copies(model: nn.Module, description: Description) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    hidden = tuple(f"{path}." for path in (*description.modules, *trained_copies(model)))
    found = {}
    for path, kind in description.modules.items():
        module: Any = modules.get(path) if path else None
        if module is None or path.startswith(hidden) or ".adapters." in f".{path}":
            raise AdapterFileError(
                f"the file has a trained copy of {path!r}, which the model does not have as a "
                "module of its own; load it into a model like the one it was saved from"
            )
        original = module.original if isinstance(module, TrainedCopy) else module
        if any(isinstance(part, Decomposed) for part in original.modules()):
            raise AdapterFileError(
                f"the file has a trained copy of {path!r}, which is adapted or holds adapted "
                "layers; call remove(model) first"
            )
        if type(original).__name__ != kind:
            raise AdapterFileError(
                f"{path!r} must be a {kind} for the file's trained copy, got a "
                f"{type(original).__name__}; load it into a model like the one it was saved from"
            )
        found[path] = copy_of(module)
    return found


def _biases(model: nn.Module, description: Description) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    apart = tuple(f"{path}." for path in (*description.modules, *trained_copies(model)))
    found = {}
    for name in description.biases:
        own = ".adapters." in f".{name}" or name.startswith(apart)
        if name not in parameters or name.rpartition(".")[2] != "bias" or own:
            raise AdapterFileError(
                f"the file has a trained bias {name!r}, which the model does not have; "
                "load it into a model like the one it was saved from"
            )
        found[name] = parameters[name]
    return found


def _place(tensor: Tensor) -> Place:
    return Place(tuple(tensor.shape), (tensor.dtype,), tensor.device, tensor.dtype)


def _check_tensors(places: dict[str, Place], description: Description, allowed: bool) -> None:
    for what, keys in (
        ("lacks", set(places) - set(description.tensors)),
        ("has a superfluous", set(description.tensors) - set(places)),
    ):
        if keys:
            raise AdapterFileError(
                f"the file {what} {min(keys)!r} for this method and this model; "
                "use the version of decomp_kernels that wrote it, or save the adapter again"
            )
    for key, place in places.items():
        if place.device.type == "meta":
            raise AdapterFileError(
                f"{key} is for a tensor on the meta device; load the base weights first"
            )
        dtype, shape = description.tensors[key]
        if shape != place.shape:
            raise AdapterFileError(
                f"{key} must have shape {place.shape}, got {shape} in the file; "
                "load the adapter into the model it was trained on"
            )
        names = [dtype_name(one) for one in place.dtypes]
        convertible = allowed and place.convert_to.is_floating_point and dtype in FLOATING
        if dtype not in names and not convertible:
            raise AdapterFileError(
                f"{key} must be {' or '.join(dict.fromkeys(names))} on this model, got {dtype} in "
                "the file; convert the model to the dtype the adapter was trained in"
            )


def _linears(modules: dict[str, nn.Module]) -> str:
    names = [
        path for path, m in modules.items() if isinstance(m, Decomposed) or decomposed_class(m)
    ]
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"Its linears are: {shown or 'none'}"
