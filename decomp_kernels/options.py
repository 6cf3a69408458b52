"""Options of adapters that are made already: those that no tensor's shape depends on."""

from dataclasses import fields, replace
from typing import Any

from torch import nn

from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import Method

CHANGEABLE = ("alpha", "scale", "dropout", "impl")


def set_options(model: nn.Module, *, adapter_name: str | None = None, **options: Any) -> nn.Module:
    """Change alpha (or scale, where the method has that), dropout or impl of adapters, in place.

    ``set_options(model, alpha=8.0)``: every layer whose active adapter, or the one of the given
    name, has the option; it replaces what alpha_pattern gave a layer.  What is saved, merged and
    explained afterwards has it too.  A compiled model is compiled anew after the first change of
    alpha or scale, and not after further ones (docs/compile.md).

    Raises TypeError or ValueError for an option that cannot be changed or has an impossible value,
    or that no adapter has, and RuntimeError where an adapter is merged; then nothing is changed.
    """
    _check_names(options)
    changed: list[tuple[Any, Method]] = []
    made: dict[int, Method] = {}  # layers that shared a method share the new one: compilers look
    for name, layer in adapted_layers(model).items():
        wanted = layer.active_adapter if adapter_name is None else adapter_name
        if wanted not in layer.adapters:
            continue
        adapter = layer.adapters[wanted]
        if not {field.name for field in fields(adapter.method)}.issuperset(options):
            continue
        if layer.merged_adapter is not None:
            raise RuntimeError(
                f"{name} has adapter {layer.merged_adapter!r} merged; call unmerge(model) first"
            )
        old = adapter.method
        made.setdefault(id(old), replace(old, **options))
        changed.append((adapter, made[id(old)]))
    if not changed:
        which = "active adapter" if adapter_name is None else f"adapter {adapter_name!r}"
        raise ValueError(
            f"no {which} has {', '.join(options)}; decomp_kernels.report(model) lists adapters "
            "with their options"
        )
    for adapter, method in changed:
        adapter.method = method
    return model


def _check_names(options: dict[str, Any]) -> None:
    if not options:
        raise TypeError(f"give an option to change, one of {', '.join(CHANGEABLE)}")
    for option in options:
        if option not in CHANGEABLE:
            raise TypeError(
                f"{option!r} cannot be changed on an adapter that is made; "
                f"{', '.join(CHANGEABLE)} can: for others, remove the adapter and adapt again"
            )
