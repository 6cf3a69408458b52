"""Adapt a whole model in place, and take it back: adapt, merge, unmerge, remove, disable, ...

Every function returns the model it was given, changes nothing where it raises, and works on what
it finds in ``model.modules()``: an adapted module is a ``Decomposed``, a trained copy of another
module a ``TrainedCopy``.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from decomp_kernels.linear import (
    Decomposed,
    check_adapter_name,
    check_method,
    decomposed_class,
    put_on,
)
from decomp_kernels.methods.base import Adapter, Method
from decomp_kernels.saved_modules import TrainedCopy, replace_module
from decomp_kernels.targets import Targets, find_targets, matches

SKIPPED = "decomp_kernels_skipped"


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
    nn.Linear and Conv1D but the output head.  exclude_modules: a list or expression likewise.
    rank_pattern and alpha_pattern: {name or expression: r or alpha} for the layers it matches.
    modules_to_save: names of other modules to train whole, in a copy that is saved with the
    adapter.  bias: which biases of the base train too: "none", "all" or "lora_only" (those of the
    adapted layers).  autocast_adapter_dtype: adapter matrices in float32 on a bf16 or fp16 layer.

    Everything else is frozen.  Modules that match but cannot be adapted are reported in a warning
    and by ``report``.  A second call with another adapter_name adds a second adapter.
    """
    check_method(method)
    check_adapter_name(adapter_name)
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias must be "none", "all" or "lora_only", got {bias!r}')
    saved_names = _modules_to_save(model, modules_to_save)
    targets = find_targets(model, target_modules, exclude_modules, tuple(saved_names))
    for name, module in targets.modules.items():
        if isinstance(module, Decomposed) and module.merged_adapter is not None:
            raise RuntimeError(
                f"{name} has adapter {module.merged_adapter!r} merged; unmerge first"
            )
        if isinstance(module, Decomposed) and adapter_name in module.adapters:
            raise ValueError(f"{name} already has an adapter {adapter_name!r}; choose another name")
    made = _make_adapters(
        targets, method, rank_pattern or {}, alpha_pattern or {}, autocast_adapter_dtype
    )

    # From here on nothing can fail: every adapter exists.
    model.requires_grad_(False)
    for name, adapter in made.items():
        layer: Any = targets.modules[name]
        if not isinstance(layer, Decomposed):
            put_on(layer, targets.classes[name])
        layer.attach(adapter_name, adapter)
    for name in saved_names:
        saved: Any = model.get_submodule(name)
        if not isinstance(saved, TrainedCopy):
            saved = replace_module(model, name, TrainedCopy(saved))
        saved.add(adapter_name)
    set_adapter(model, adapter_name)
    _train_biases(model, bias)
    setattr(model, SKIPPED, {**getattr(model, SKIPPED, {}), **targets.skipped})
    if targets.skipped:
        listed = "; ".join(f"{name}: {reason}" for name, reason in targets.skipped.items())
        warnings.warn(f"not adapted: {listed}", stacklevel=2)
    return model


def merge(model: nn.Module, keep_base: bool = True) -> nn.Module:
    """Write the active adapters into the weights: float32 arithmetic, one rounding.

    keep_base keeps the base weights on the host, so that ``unmerge`` restores them bit for bit.
    A method whose branch is no linear map refuses, and then nothing is changed.
    """
    layers = {n: layer for n, layer in _layers(model).items() if layer.merged_adapter is None}
    for name, layer in layers.items():
        layer.check_mergeable(name)
    done: list[Any] = []
    try:
        for name, layer in layers.items():
            layer.merge(path=name)
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if not keep_base:
        for layer in layers.values():
            layer.kept_base = None
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take merged adapters out again, exactly; refused where merge did not keep the base."""
    layers = _layers(model)
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
    """Make plain modules of the adapted ones: merged values stay, unmerged adapters are dropped."""
    merged = any(layer.merged_adapter is not None for layer in _layers(model).values())
    for layer in _layers(model).values():
        layer.remove()
    for name, module in list(model.named_modules()):
        if isinstance(module, TrainedCopy):
            replace_module(model, name, module.current() if merged else module.original)
    if hasattr(model, SKIPPED):
        delattr(model, SKIPPED)
    return model


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model is its base, e.g. as the reference of DPO."""
    found: list[Any] = [*_layers(model).values(), *_copies(model).values()]
    merged = [module for module in found if getattr(module, "merged_adapter", None) is not None]
    if merged:
        raise RuntimeError("adapters are merged into the weights; call unmerge(model) first")
    before = [module.disabled for module in found]
    for module in found:
        module.disabled = True
    try:
        yield model
    finally:
        for module, was in zip(found, before, strict=True):
            module.disabled = was


def set_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Make ``adapter_name`` active in every layer that has it; the other layers use none.

    Only the active adapter is trained.
    """
    layers, copies = _layers(model), _copies(model)
    known = {name for layer in layers.values() for name in layer.adapters}
    if adapter_name not in known:
        raise ValueError(
            f"no layer has an adapter {adapter_name!r}; the model has {', '.join(sorted(known))}"
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
    waiting: dict[int, Adapter] = {}
    for name, layer in _layers(model).items():
        for adapter_name, adapter in layer.adapters.items():
            if adapter.initialized:
                continue
            if layer.weight.device.type == "meta":
                raise RuntimeError(f"{name} is on the meta device still; load its weight first")
            waiting[id(adapter)] = adapter
    groups: dict[str, list[tuple[str, Decomposed]]] = {}
    for name, layer in _layers(model).items():
        for adapter_name, adapter in layer.adapters.items():
            if id(adapter) in waiting:
                groups.setdefault(adapter_name, []).append((name, layer))
    for adapter_name, members in groups.items():
        methods = {name: _adapter(layer, adapter_name).method for name, layer in members}
        shared = _share(methods, dict(members))
        for name, layer in members:
            old = _adapter(layer, adapter_name)
            matrix = next((p for p in old.parameters() if p.dim() == 2), None)
            dtype = None if matrix is None else matrix.dtype
            fresh = layer.make_adapter(old.method, name, dtype, shared.get(repr(old.method)))
            fresh.train(old.training)
            layer.adapters[adapter_name] = fresh
            if layer.active_adapter is not None:
                layer.set_adapter(layer.active_adapter)
    return model


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    loraplus_lr_ratio: float = 1.0,
    decay_scales_to_one: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer groups over what trains: matrices, up matrices, scales, and the rest.

    ``up`` has lr * loraplus_lr_ratio (LoRA+, arXiv:2402.12354).  weight_decay is for matrices;
    scales and other vectors have none, for a decay to 0 would pull W' to 0.  With
    decay_scales_to_one the groups of scales carry "decay_to_one": call
    ``decay_to_one(optimizer)`` once, and each step pulls them towards 1 by lr * weight_decay.
    """
    matrices, ups, scales, rest = [], [], [], []
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        last = name.rpartition(".")[2]
        if ".adapters." in f".{name}" and last == "up":
            ups.append(tensor)
        elif ".adapters." in f".{name}" and last in ("in_scale", "out_scale"):
            scales.append(tensor)
        elif tensor.dim() >= 2:
            matrices.append(tensor)
        else:
            rest.append(tensor)
    groups = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": ups, "lr": lr * loraplus_lr_ratio, "weight_decay": weight_decay},
        {"params": scales, "lr": lr, "weight_decay": 0.0,
         "decay_to_one": weight_decay if decay_scales_to_one else 0.0},
        {"params": rest, "lr": lr, "weight_decay": 0.0},
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model trains no parameter; call adapt(model, method) first")
    return groups


def decay_to_one(optimizer: torch.optim.Optimizer) -> Any:
    """Before each step, p <- p - lr * decay_to_one * (p - 1) for the groups that ask for it."""

    def pull(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            rate = group.get("decay_to_one", 0.0) * group["lr"]
            if rate:
                with torch.no_grad():
                    for tensor in group["params"]:
                        tensor.lerp_(torch.ones_like(tensor), rate)

    return optimizer.register_step_pre_hook(pull)


def print_trainable_parameters(model: nn.Module) -> str:
    """Print, and return, how many parameters train; tied and shared ones count once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trained / max(total, 1)
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"
    print(line)
    return line


def report(model: nn.Module) -> str:
    """What was adapted, with which method, and what was not and why; one line a module."""
    lines = []
    for name, layer in _layers(model).items():
        for adapter_name, adapter in layer.adapters.items():
            state = "active" if adapter_name == layer.active_adapter else "inactive"
            state = "merged" if adapter_name == layer.merged_adapter else state
            lines.append(f"{name}: {adapter_name} ({state}) {adapter.method!r}")
    for name, copy in _copies(model).items():
        lines.append(f"{name}: trained whole ({', '.join(copy.copies)})")
    for name, reason in getattr(model, SKIPPED, {}).items():
        lines.append(f"{name}: not adapted, {reason}")
    return "\n".join(lines) or "nothing is adapted"


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Decomposed)}


def _copies(model: nn.Module) -> dict[str, TrainedCopy]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TrainedCopy)}


def _adapter(layer: Decomposed, name: str) -> Any:
    return layer.adapters[name]


def _make_adapters(
    targets: Targets,
    method: Method,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
    autocast_adapter_dtype: bool,
) -> dict[str, Adapter]:
    methods = {
        name: _with_patterns(method, name, rank_pattern, alpha_pattern) for name in targets.modules
    }
    probes = {
        name: _probe(module, targets.classes[name]) for name, module in targets.modules.items()
    }
    shared = _share(methods, probes)
    made = {}
    for name, probe in probes.items():
        dtype = None if autocast_adapter_dtype else probe.base_weight().dtype
        made[name] = probe.make_adapter(methods[name], name, dtype, shared.get(repr(methods[name])))
        made[name].train(targets.modules[name].training)
    return made


def _probe(module: nn.Module, cls: type[Decomposed]) -> Any:
    """A stand-in that shares the module's parameters, so that making adapters changes nothing."""
    if isinstance(module, Decomposed):
        return module
    stand_in = nn.Module()
    stand_in._parameters = module._parameters
    stand_in.training = module.training
    put_on_stand_in: Any = stand_in
    put_on(put_on_stand_in, cls)
    return put_on_stand_in


def _share(methods: dict[str, Method], layers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What Method.share makes, once for all layers of one method."""
    members: dict[str, list[Any]] = {}
    by_repr = {repr(method): method for method in methods.values()}
    for name, method in methods.items():
        members.setdefault(repr(method), []).append(layers[name].base_weight())
    made = {}
    for key, weights in members.items():
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        made[key] = by_repr[key].share(shapes, dtype, weights[0].device)
    return made


def _with_patterns(
    method: Method, name: str, ranks: dict[str, int], alphas: dict[str, float]
) -> Method:
    options = {field.name for field in fields(method)}
    changed: dict[str, Any] = {}
    for option, pattern in (("r", ranks), ("alpha", alphas)):
        for key, value in pattern.items():
            if matches(name, [key]) or matches(name, key):
                if option not in options:
                    raise ValueError(
                        f"{type(method).__name__} has no {option}: it takes no pattern for it"
                    )
                changed[option] = value
                break
    return replace(method, **changed) if changed else method


def _modules_to_save(model: nn.Module, wanted: list[str] | None) -> list[str]:
    if not wanted:
        return []
    names = [
        name
        for name, module in model.named_modules()
        if name and matches(name, wanted) and ".copies." not in name
    ]
    missing = [w for w in wanted if not any(matches(name, [w]) for name in names)]
    if missing:
        raise ValueError(
            f"modules_to_save names {missing[0]!r}, which no module of the model has; "
            "give a full name or its last parts"
        )
    return names


def _train_biases(model: nn.Module, bias: str) -> None:
    if bias == "all":
        for name, tensor in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and ".adapters." not in name:
                tensor.requires_grad_(True)
    elif bias == "lora_only":
        for layer in _layers(model).values():
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
