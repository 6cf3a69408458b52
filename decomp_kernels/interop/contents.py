"""One adapter of a model, described and as tensors:  model  ->  (Description, {key: tensor}).

    layers.<path>.<tensor>      a parameter or persistent buffer of the adapter on this layer
    modules.<path>.<tensor>     the state dict of a module that is trained whole
    biases.<name>               a bias of the base that is trained

A frozen tensor that is the same on several layers, such as VeRA's projections, is stored once.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop.description import Description, bias_key, layer_key, module_key
from decomp_kernels.interop.fingerprint import BaseRecord, base_record, unmerged_base
from decomp_kernels.interop.tensor_file import check_writable, dtype_name
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import Method
from decomp_kernels.model import trained_biases
from decomp_kernels.saved_modules import trained_copies
from decomp_kernels.sharding import reshard, whole


def contents(model: nn.Module, adapter_name: str | None) -> tuple[Description, dict[str, Tensor]]:
    """Raises where there is nothing to save, or nothing that could be loaded again.

    Tensors in shards are gathered, in one order on all ranks, which must all call this.
    """
    reshard(model)
    every = adapted_layers(model)
    name = which_adapter(every, adapter_name)
    layers = {path: layer for path, layer in every.items() if name in layer.adapters}
    copies = {path: c.copies[name] for path, c in trained_copies(model).items() if name in c.copies}
    tensors, shared = _layer_tensors({path: layer.adapters[name] for path, layer in layers.items()})
    for path, module in copies.items():
        for tensor_name, tensor in module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{path} keeps {tensor_name} in its state, which is no tensor but a "
                    f"{type(tensor).__name__}: it cannot be saved; leave it out of modules_to_save"
                )
            tensors[module_key(path, tensor_name)] = whole(tensor)
    biases = _biases(model, every)
    tensors |= {bias_key(bias): tensor for bias, tensor in biases.items()}
    for key, tensor in tensors.items():
        _check(key, tensor)

    methods: list[tuple[str, dict[str, Any]]] = []
    records: dict[str, tuple[int, BaseRecord | None]] = {}
    for path, layer in layers.items():
        method = layer.adapters[name].method
        spelled = (method.name, saved_options(method))
        if spelled not in methods:
            methods.append(spelled)
        trained = f"{path}.bias".lstrip(".") in biases
        records[path] = (methods.index(spelled), base_record(layer, bias_is_trained=trained))
    table = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    modules: dict[str, str | None] = {
        path: type(module).__name__ for path, module in copies.items()
    }
    return Description(name, methods, records, modules, sorted(biases), table, shared, ""), tensors


def saved_options(method: Method) -> dict[str, Any]:
    """The options that say what is computed, and not ``impl``, which says where."""
    found = {}
    for field in fields(method):
        if field.name == "impl":
            continue
        value = getattr(method, field.name)
        plain = value if isinstance(value, tuple | list) else (value,)
        if not all(one is None or isinstance(one, int | float | str) for one in plain):
            raise TypeError(
                f"{type(method).__name__}({field.name}=...) must be a number, text, None or a "
                f"tuple of such to be saved, got {type(value).__name__}"
            )
        found[field.name] = value
    return found


def which_adapter(layers: dict[str, Any], adapter_name: str | None) -> str:
    """The adapter of this name, or the active one.  Raises ValueError where there is none."""
    known = sorted({name for layer in layers.values() for name in layer.adapters})
    if not known:
        raise ValueError("the model has no adapter to save; call adapt(model, method) first")
    if adapter_name is None:
        active = {layer.active_adapter for layer in layers.values()} - {None}
        if len(active) != 1 and len(known) != 1:
            raise ValueError(
                f"adapter_name must be one of {', '.join(known)}: the model has several adapters, "
                f"and {len(active)} are active"
            )
        return active.pop() if len(active) == 1 else known[0]
    if adapter_name not in known:
        raise ValueError(
            f"the model has no adapter {adapter_name!r} to save; it has {', '.join(known)}"
        )
    return adapter_name


def _layer_tensors(adapters: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by key, {key: key that stands for it})."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    frozen: dict[str, list[str]] = {}  # keys of the frozen tensors of one name
    for path, adapter in adapters.items():
        if not adapter.initialized:
            raise RuntimeError(
                f"the adapter of {path or 'the layer'} was made on the meta device and has no "
                "values yet; load the base weights, then call decomp_kernels.initialize(model)"
            )
        for name, own in adapter.state_dict(keep_vars=True).items():
            tensor, key = whole(own), layer_key(path, name)
            same = None
            if name in adapter.frozen:
                same = _first_equal(tensor, frozen.setdefault(name, []), tensors)
            if same is not None:
                shared[key] = same
                continue
            if name in adapter.frozen:
                frozen[name].append(key)
            tensors[key] = tensor
    return tensors, shared


def _first_equal(tensor: Tensor, keys: Iterable[str], tensors: dict[str, Tensor]) -> str | None:
    for key in keys:
        other = tensors[key]
        if other is tensor:
            return key
        alike = (other.dtype, other.shape, other.device) == (
            tensor.dtype, tensor.shape, tensor.device,
        )  # fmt: skip
        if alike and torch.equal(other, tensor):
            return key
    return None


def _biases(model: nn.Module, layers: dict[str, Any]) -> dict[str, Tensor]:
    """The trained biases of the base, without the adapter where one is merged."""
    asked = set(trained_biases(model))
    apart = tuple(f"{path}." for path in trained_copies(model))
    found: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        path, _, last = name.rpartition(".")
        own = ".adapters." in f".{name}" or name.startswith(apart)
        if last != "bias" or own or not (tensor.requires_grad or name in asked):
            continue
        base = unmerged_base(layers[path]) if path in layers else (None, whole(tensor))
        if base is None or base[1] is None:
            raise ValueError(
                f"{name} is trained, and merging has overwritten it; save before merging, or "
                "merge with keep_base=True"
            )
        found[name] = base[1]
    return found


def _check(key: str, tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise RuntimeError(f"{key} is on the meta device and has no values; load the weights first")
    check_writable(key, tensor)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(
            f"{key} must be finite to be saved, and it holds NaN or infinity; nothing was written: "
            "an adapter saved before is as it was"
        )
