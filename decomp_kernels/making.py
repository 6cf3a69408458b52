"""Making the adapters of a whole model beside it, so that whatever fails has changed nothing.

{path: module}, method, patterns  ->  {path: Adapter}      one Method.share for equal methods
"""

import re
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from decomp_kernels.linear import Decomposed, stand_in
from decomp_kernels.methods.base import Adapter, Method
from decomp_kernels.targets import Targets


def make_adapters(
    targets: Targets,
    method: Method,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
    autocast_adapter_dtype: bool,
) -> dict[str, Adapter]:
    names = list(targets.modules)
    options = {
        "r": _by_name("rank_pattern", rank_pattern, names),
        "alpha": _by_name("alpha_pattern", alpha_pattern, names),
    }
    methods = {name: _with_options(method, name, options) for name in names}
    layers = {
        name: module if isinstance(module, Decomposed) else stand_in(module, targets.classes[name])
        for name, module in targets.modules.items()
    }
    shared = make_shared(methods, layers)
    made = {}
    for name, layer in layers.items():
        dtype = None if autocast_adapter_dtype else layer.base_weight().dtype
        made[name] = layer.make_adapter(methods[name], name, dtype, shared.get(repr(methods[name])))
    return made


def make_shared(
    methods: dict[str, Method], layers: dict[str, Any]
) -> dict[str, dict[str, nn.Parameter]]:
    """What Method.share makes, once for all layers of one method: {repr(method): tensors}."""
    members: dict[str, list[Any]] = {}
    by_repr = {repr(method): method for method in methods.values()}
    for name, method in methods.items():
        members.setdefault(repr(method), []).append(layers[name].base_weight())
    made = {}
    for key, weights in members.items():
        kinds = {(torch.promote_types(w.dtype, torch.float32), w.device) for w in weights}
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        made[key] = by_repr[key].share(shapes, *next(iter(kinds)))
        if made[key] and len(kinds) > 1:
            listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(
                f"{type(by_repr[key]).__name__} shares tensors among its layers, which must be of "
                f"one dtype and on one device, got {listed}; convert or move the model "
                "first, or leave layers out with exclude_modules"
            )
    return made


def _by_name(what: str, pattern: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """{layer: value} by PEFT's rule: the key is a name's last parts, or an expression of them."""
    if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
        raise TypeError(f"{what} must be a dict from names to values, got {pattern!r}")
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        try:
            matched = [name for name in names if re.fullmatch(rf"(.*\.)?({key})", name)]
        except re.error as error:
            raise ValueError(
                f"{what} has a key that is no valid regular expression ({error}): {key!r}"
            ) from None
        if not matched:
            raise ValueError(
                f"{what} names {key!r}, which no adapted layer matches; the layers are "
                + ", ".join(names[:6])
                + (", ..." if len(names) > 6 else "")
            )
        found = {**dict.fromkeys(matched, value), **found}  # the first key that matches wins
    return found


def _with_options(method: Method, name: str, options: dict[str, dict[str, Any]]) -> Method:
    changed = {option: values[name] for option, values in options.items() if name in values}
    unknown = set(changed) - {field.name for field in fields(method)}
    if unknown:
        raise ValueError(
            f"{type(method).__name__} has no option {unknown.pop()!r}: it takes no pattern for it"
        )
    return replace(method, **changed) if changed else method
