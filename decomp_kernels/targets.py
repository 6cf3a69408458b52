"""Which modules of a model a method goes on, by PEFT's rules, and why others cannot take it."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from decomp_kernels.linear import Decomposed, adapted_layers, decomposed_class
from decomp_kernels.quantized import is_quantized, why_not_quantized
from decomp_kernels.saved_modules import TrainedCopy

Names = str | list[str] | tuple[str, ...] | set[str]


@dataclass
class Targets:
    """What was found: modules to adapt with the class each becomes, and the others with reasons."""

    modules: dict[str, nn.Module]
    classes: dict[str, type[Decomposed]]
    skipped: dict[str, str]


def find_targets(
    model: nn.Module, target: Names, exclude: Names | None, not_these: tuple[str, ...]
) -> Targets:
    """Raises ValueError where nothing can be adapted, with what there would be to choose from."""
    check_names("target_modules", target)
    if exclude is not None:
        check_names("exclude_modules", exclude)
    every_linear = target == "all-linear"
    head = output_head(model) if every_linear else None
    found = Targets({}, {}, {})
    owners: dict[int, str] = {
        id(layer.weight): name for name, layer in adapted_layers(model).items()
    }
    parents_of_trained = [name for name, m in model.named_modules() if isinstance(m, TrainedCopy)]
    for name, module in model.named_modules():
        inside = any(_is_within(name, other) for other in (*not_these, *parents_of_trained))
        if inside or ".adapters." in f".{name}":
            continue
        if exclude is not None and matches(name, exclude):
            continue
        cls = type(module) if isinstance(module, Decomposed) else decomposed_class(module)
        if every_linear:
            if cls is None or module is head or not name:
                continue
        elif not matches(name, target):
            continue
        reason = why_not(model, name, module, cls, owners)
        if reason is not None:
            found.skipped[name] = reason
            continue
        owners[id(module.weight)] = name
        found.modules[name] = module
        found.classes[name] = cls  # type: ignore[assignment]
    if not found.modules:
        raise ValueError(_nothing_found(model, target, found.skipped))
    if not isinstance(target, str):
        names = [name for name, _ in model.named_modules()]
        for one in target:
            if not any(matches(name, [one]) for name in names):
                found.skipped[one] = "no module has this name"
    return found


def matches(name: str, wanted: Names) -> bool:
    """A list matches by full name or last parts; a string is a regular expression of the whole."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def check_names(what: str, names: Names) -> None:
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(
                f"{what} is no valid regular expression ({error}): {names!r}; "
                "give a list for plain names"
            ) from None
    elif not isinstance(names, list | tuple | set) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"{what} must be a regular expression or a list of module names, got {names!r}"
        )
    elif not names:
        raise ValueError(
            f"{what} must name at least one module, got an empty {type(names).__name__}"
        )


def why_not(
    model: nn.Module,
    name: str,
    module: nn.Module,
    cls: type[Decomposed] | None,
    owners: dict[int, str],
) -> str | None:
    """The reason why ``module`` cannot become a ``cls``, if any; owners: {id(weight): path}."""
    if cls is None:
        kind = type(module).__name__
        if isinstance(module, nn.Linear):
            return f"it is a {kind}, not a plain nn.Linear: its forward may not be a linear's"
        return f"it is a {kind}; only nn.Linear and Conv1D are supported"
    if not name:
        return "it is the model itself; use DecomposedLinear(linear, method)"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight itself and never calls the module"
    if reason := why_not_quantized(module):
        return reason
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (spectral_norm, weight_norm, prune); remove that"
    if not weight.is_floating_point() and not is_quantized(module):
        return f"its weight is {weight.dtype}, not floating point"
    owner = owners.get(id(weight), name)
    if owner != name:
        return f"it shares its weight with {owner}, which is adapted"
    if 0 in weight.shape:
        return f"its weight is empty, {tuple(weight.shape)}"
    return None


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head, which "all-linear" leaves out, as PEFT does."""
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        return getter()
    except NotImplementedError:  # transformers' base models define the method without a head
        return None


def _is_within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _nothing_found(model: nn.Module, target: Names, skipped: dict[str, str]) -> str:
    if skipped:
        name, reason = next(iter(skipped.items()))
        return f"no module can be adapted: {name} matches {target!r}, but {reason}"
    linears = [name for name, m in model.named_modules() if name and decomposed_class(m)]
    shown = ", ".join(linears[:6]) + (", ..." if len(linears) > 6 else "")
    return (
        f"target_modules={target!r} matches no module; the model's linears are: {shown or 'none'}"
    )
