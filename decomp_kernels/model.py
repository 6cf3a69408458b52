"""Adapt a whole model in place, and take it back: adapt, merge, unmerge, remove, disable, ...

Every function returns the model it was given, changes nothing where it raises, and works on what
it finds in ``model.modules()``: an adapted module is a ``Decomposed``, a trained copy of another
module a ``TrainedCopy``.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from decomp_kernels.linear import (
    Decomposed,
    adapted_layers,
    check_adapter_name,
    check_method,
    decomposed_class,
    put_on,
)
from decomp_kernels.making import make_adapters, make_shared
from decomp_kernels.methods.base import Adapter, Method
from decomp_kernels.quantized import is_quantized
from decomp_kernels.saved_modules import TrainedCopy, copy_of, replace_module, trained_copies
from decomp_kernels.sharding import check_one_process
from decomp_kernels.targets import check_names, find_targets, matches

SKIPPED = "decomp_kernels_skipped"  # attributes that adapt leaves on the model
TRAINED_BIASES = "decomp_kernels_trained_biases"


def adapt(
    model: nn.Module,
    method: Method,
    target_modules: str | list[str] | tuple[str, ...] | set[str] = "all-linear",
    *,
    exclude_modules: str | list[str] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    modules_to_save: list[str] | None = None,
    bias: str = "none",
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Put ``method`` on the linears of ``model`` that ``target_modules`` names, in place.

    target_modules, by PEFT's rules: a list of names (a module matches by its full name or by the
    last parts of it), a regular expression that matches the full name, or "all-linear": every
    nn.Linear and Conv1D but the language-model head.  exclude_modules: a list or expression too.
    rank_pattern and alpha_pattern: {name or expression: r or alpha} for the layers it matches.
    modules_to_save: names of other modules to train whole, in a copy that is saved with the
    adapter.  bias: which biases of the base train too: "none", "all" or "lora_only" (those of the
    adapted layers).  autocast_adapter_dtype: adapter matrices in float32 on a bf16 or fp16 layer.

    Everything else is frozen.  Modules that match but cannot be adapted are reported in a warning
    and by ``report``.  A second call with another adapter_name adds a second adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_method(method)
    check_adapter_name(adapter_name)
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
    check_can_add(model, adapter_name, trains_biases=bias != "none")
    saved_names = _modules_to_save(model, modules_to_save)
    targets = find_targets(model, target_modules, exclude_modules, tuple(saved_names))
    for name, module in targets.modules.items():
        if isinstance(module, Decomposed) and adapter_name in module.adapters:
            raise ValueError(f"{name} already has an adapter {adapter_name!r}; choose another name")
    made = make_adapters(
        targets, method, rank_pattern or {}, alpha_pattern or {}, autocast_adapter_dtype
    )
    copies = {name: copy_of(model.get_submodule(name)) for name in saved_names}
    _warn_of_ties(model, saved_names)
    if targets.skipped:
        listed = "; ".join(f"{name}: {reason}" for name, reason in targets.skipped.items())
        warnings.warn(f"not adapted: {listed}", stacklevel=2)

    # From here on nothing can fail: everything is made.
    biases = _biases(model, bias, set(targets.modules) | set(adapted_layers(model)), saved_names)
    put_adapters(model, adapter_name, made, copies, biases)
    setattr(model, SKIPPED, {**getattr(model, SKIPPED, {}), **targets.skipped})
    return model


def put_adapters(
    model: nn.Module,
    adapter_name: str,
    made: dict[str, Adapter],
    copies: dict[str, nn.Module],
    biases: list[str],
) -> None:
    """Attach made adapters and copies of whole modules under one name, and train these alone.

    made, copies: by path in the model.  biases: names of parameters of the base that train too.
    """
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    for name, adapter in made.items():
        layer: Any = modules[name]
        if not isinstance(layer, Decomposed):
            put_on(layer, decomposed_class(layer))  # type: ignore[arg-type]
        layer.attach(adapter_name, adapter)
        if isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            layer.keep_from_fast_path()
    for name, trained in copies.items():
        saved: Any = modules[name]
        if not isinstance(saved, TrainedCopy):
            saved = replace_module(model, saved, TrainedCopy(saved))
        saved.add(adapter_name, trained)
    set_adapter(model, adapter_name)
    parameters = dict(model.named_parameters())
    for name in biases:
        parameters[name].requires_grad_(True)
    if biases:
        setattr(model, TRAINED_BIASES, sorted({*trained_biases(model), *biases}))


def check_can_add(model: nn.Module, adapter_name: str, *, trains_biases: bool) -> None:
    """Raise where the model is in no state to take an adapter of this name."""
    check_one_process(model, "adding an adapter")
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if layer.merged_adapter is not None:
            raise RuntimeError(
                f"{name} has adapter {layer.merged_adapter!r} merged; call unmerge(model) first"
            )
    others = {other for layer in layers.values() for other in layer.adapters} - {adapter_name}
    if others and (trains_biases or trained_biases(model)):
        raise ValueError(
            "trained biases are the base's own, which two adapters cannot share: the model has "
            f"{', '.join(sorted(others))}, so {adapter_name!r} cannot be added; use "
            'bias="none", or BitFit, whose biases are its own'
        )


def trained_biases(model: nn.Module) -> list[str]:
    """Names of the base's biases that were trained with the adapter."""
    return getattr(model, TRAINED_BIASES, [])


def merge(model: nn.Module, keep_base: bool = True, requantize: bool = False) -> nn.Module:
    """Write the active adapters into the weights: float32 arithmetic, one rounding.

    keep_base keeps the base weights on the host (quantised ones where they are), so that
    ``unmerge`` restores them bit for bit.  A method whose branch is no linear map refuses, and then
    nothing is changed.  While merged, the state dict holds the merged weights and the adapters:
    load it only into a merged model.
    requantize: where weights are quantised, merge and quantise them anew, by the library that they
    are of; ``report`` then has the error, ||quantised - merged|| / ||merged||.  Refused without it.
    """
    check_one_process(model, "merging")
    _check_not_pefts(model, "merge", "model.merge_adapter()")
    layers = {
        n: layer for n, layer in adapted_layers(model).items() if layer.merged_adapter is None
    }
    for name, layer in layers.items():
        layer.check_mergeable(name, requantize)
    without_bias = [name for name, layer in layers.items() if layer.bias is None]
    done: list[Any] = []
    try:
        for name, layer in layers.items():
            layer.merge(path=name, requantize=requantize)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if not keep_base:
        for layer in layers.values():
            layer.kept_base = None
    given = [name for name in without_bias if layers[name].bias is not None]
    if given:
        warnings.warn(
            f"{', '.join(given[:3])}{', ...' if len(given) > 3 else ''} had no bias and have one "
            "now: the base architecture will not load it; save the adapter instead",
            stacklevel=2,
        )
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take merged adapters out again, exactly; refused where merge did not keep the base."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if layer.merged_adapter is not None and layer.kept_base is None:
            raise RuntimeError(
                f"the base weight of {name} was not kept; merge with keep_base=True, "
                "or load the base model again"
            )
    for layer in layers.values():
        layer.unmerge()
    return model


def remove(model: nn.Module) -> nn.Module:
    """Make plain modules of the adapted ones: merged values stay, unmerged adapters are dropped.

    Parameters stay frozen, as ``adapt`` left them: ``model.requires_grad_(True)`` trains them all.
    """
    check_one_process(model, "removing adapters")
    merged = any(layer.merged_adapter is not None for layer in adapted_layers(model).values())
    for layer in adapted_layers(model).values():
        layer.remove()
    for module in trained_copies(model).values():
        replace_module(model, module, module.current() if merged else module.original)
    for left in (SKIPPED, TRAINED_BIASES):
        if hasattr(model, left):
            delattr(model, left)
    return model


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model is its base, e.g. as the reference of DPO."""
    _check_not_pefts(model, "disable", "model.disable_adapter()")
    found: list[Any] = [*adapted_layers(model).values(), *trained_copies(model).values()]
    merged = [module for module in found if getattr(module, "merged_adapter", None) is not None]
    if merged:
        raise RuntimeError("adapters are merged into the weights; call unmerge(model) first")
    for module in found:
        module.disabled += 1
    try:
        yield model
    finally:
        for module in found:
            module.disabled -= 1


def _check_not_pefts(model: nn.Module, function: str, theirs: str) -> None:
    """Where all adapters are PEFT's there is nothing to do here, and that would pass unseen."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or adapted_layers(model):
        return
    if any(isinstance(module, peft.BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"the adapters of this {type(model).__name__} are PEFT's, and {function} of "
            f"decomp_kernels is for those of adapt; use PEFT's {theirs}"
        )


def set_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Make ``adapter_name`` active in every layer that has it; the other layers use none.

    Only the active adapter is trained.
    """
    layers, copies = adapted_layers(model), trained_copies(model)
    known = {name for layer in layers.values() for name in layer.adapters}
    if adapter_name not in known:
        raise ValueError(
            f"no layer has an adapter {adapter_name!r}; the model has "
            + (", ".join(sorted(known)) or "none: call adapt(model, method) first")
        )
    merged = [name for name, layer in layers.items() if layer.merged_adapter is not None]
    if merged:
        raise RuntimeError(f"{merged[0]} is merged; call unmerge(model) first")
    for layer in layers.values():
        if adapter_name in layer.adapters:
            layer.set_adapter(adapter_name)
        else:
            layer.active_adapter = None
            layer.adapters.requires_grad_(False)
    for copy in copies.values():
        copy.set_adapter(adapter_name if adapter_name in copy.copies else None)
    return model


@torch.no_grad()
def initialize(model: nn.Module) -> nn.Module:
    """Fill adapters that were made on the meta device, from the base weights loaded since."""
    waiting: dict[str, dict[str, Any]] = {}  # layers by the adapter's name
    for name, layer in adapted_layers(model).items():
        for adapter_name, adapter in layer.adapters.items():
            if adapter.initialized:
                continue
            if layer.weight.device.type == "meta":
                raise RuntimeError(f"{name} is on the meta device still; load its weight first")
            waiting.setdefault(adapter_name, {})[name] = layer
    made: list[tuple[Any, str, Adapter]] = []
    for adapter_name, layers in waiting.items():
        methods = {name: layer.adapters[adapter_name].method for name, layer in layers.items()}
        shared = make_shared(methods, layers)
        for name, layer in layers.items():
            old = layer.adapters[adapter_name]
            matrix = next((p for p in old.parameters() if p.dim() == 2), None)
            dtype = None if matrix is None else matrix.dtype
            fresh = layer.make_adapter(old.method, name, dtype, shared.get(repr(old.method)))
            fresh.train(old.training)
            made.append((layer, adapter_name, fresh))
    for layer, adapter_name, fresh in made:
        layer.adapters[adapter_name] = fresh
        if layer.active_adapter is None:
            layer.adapters.requires_grad_(False)
        else:
            layer.set_adapter(layer.active_adapter)
    return model


def print_trainable_parameters(model: nn.Module) -> str:
    """Print, and return, how many parameters train; tied and shared ones count once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trained / max(total, 1)
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"
    print(line)
    return line


def adapted_lines(model: nn.Module) -> list[str]:
    """A line for each module: what it was adapted with, or why it was not."""
    lines = []
    for name, layer in adapted_layers(model).items():
        for adapter_name, adapter in layer.adapters.items():
            state = "active" if adapter_name == layer.active_adapter else "inactive"
            state = _merged_state(layer) if adapter_name == layer.merged_adapter else state
            lines.append(f"{name}: {adapter_name} ({state}) {adapter.method!r}")
    for name, copy in trained_copies(model).items():
        lines.append(f"{name}: trained whole ({', '.join(copy.copies)})")
    for name, reason in getattr(model, SKIPPED, {}).items():
        lines.append(f"{name}: not adapted, {reason}")
    return lines


def _merged_state(layer: Decomposed) -> str:
    error = layer.requantization_error
    return "merged" if error is None else f"merged, quantised anew with relative error {error:.3g}"


def _modules_to_save(model: nn.Module, wanted: list[str] | None) -> list[str]:
    """The outermost modules that the names match, each in full."""
    if not wanted:
        return []
    if isinstance(wanted, str):
        raise TypeError(f"modules_to_save must be a list of module names, got {wanted!r}")
    check_names("modules_to_save", wanted)
    names: list[str] = []
    inside = [f"{name}." for name in trained_copies(model)]
    for name, module in model.named_modules():
        hidden = name.startswith((*inside, *(f"{other}." for other in names)))
        if not name or hidden or not matches(name, wanted):
            continue
        if any(isinstance(part, Decomposed) for part in module.modules()):
            raise ValueError(
                f"modules_to_save names {name}, which is adapted or holds adapted layers; "
                "choose modules without, or call remove(model) first"
            )
        if any(is_quantized(part) for part in module.modules()):
            raise ValueError(
                f"modules_to_save names {name}, whose weight is quantised and cannot be trained; "
                "keep it from being quantised (llm_int8_skip_modules, exclude_modules), or adapt it"
            )
        names.append(name)
    within = tuple(f"{name}." for name in names)
    found = [*names, *(name for name, _ in model.named_modules() if name.startswith(within))]
    missing = [one for one in wanted if not any(matches(name, [one]) for name in found)]
    if missing:
        raise ValueError(
            f"modules_to_save names {missing[0]!r}, which no module of the model has; "
            "give a full name or its last parts"
        )
    return names


def _warn_of_ties(model: nn.Module, saved: list[str]) -> None:
    """A trained copy of a module leaves what shares a parameter with it at the base's values."""
    within = tuple(f"{name}." for name in saved)
    shared = [
        (name, tensor)
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name.startswith(within) and ".copies." not in name
    ]
    for name, tensor in model.named_parameters(remove_duplicate=False):
        tied = [own for own, other in shared if other is tensor and not name.startswith(within)]
        if tied:
            warnings.warn(
                f"{tied[0]} is trained as a copy, and {name}, which was the same parameter, stays "
                "as it is: name both modules in modules_to_save, or neither",
                stacklevel=3,
            )


def _biases(model: nn.Module, bias: str, layers: set[str], saved: list[str]) -> list[str]:
    """Names of the base's biases that train: not those of modules that are trained as copies."""
    if bias == "none":
        return []
    apart = tuple(f"{name}." for name in (*saved, *trained_copies(model)))
    found = []
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        asked = last == "bias" and (bias == "all" or owner in layers)
        if asked and ".adapters." not in f".{name}" and not name.startswith(apart):
            found.append(name)
    return found
