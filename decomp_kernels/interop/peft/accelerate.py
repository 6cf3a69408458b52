"""An existing PEFT model on our operator, and back: accelerate, restore, and what report says.

Each PEFT layer gets a subclass of its own class, on the instance; parameters, names, checkpoints,
merging and switching stay PEFT's, and no class or module of PEFT is changed.
"""

import sys
import warnings
from typing import Any

from torch import nn


def accelerate(model: nn.Module) -> nn.Module:
    """Run the PEFT layers of ``model`` on the fused operator, in place; returns the model.

    model: a PeftModel, a transformers model with ``add_adapter``, or any module with PEFT layers in
    it.  A layer computes what it did before, in the same dtypes, and PEFT's own forward runs where
    the operator would not compute the same: merged, disabled, several adapters at once, hooks on
    the modules inside, sharded tensors.  ``report(model)`` lists every layer with how often which
    ran, and why.  A dropout mask is another one for the same seed.  Layers of other kinds stay as
    they are, and a warning names them.  A second call takes in layers that were added since.

    Raises ImportError without PEFT, and ValueError where the model has no PEFT layer.
    """
    layers = _peft_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no PEFT layer to accelerate; give the model that "
            "peft.get_peft_model returned, or adapt a plain one with decomp_kernels.adapt"
        )
    from decomp_kernels.interop.peft.accelerated import Accelerated, Fused
    from decomp_kernels.interop.peft.layers import accelerated_class

    done = {name for name, m in layers.items() if isinstance(m, Accelerated) or _is_ours(m)}
    plain = {name: layer for name, layer in layers.items() if name not in done}
    skipped = {name: why for name, layer in plain.items() if (why := _why_not(layer)) is not None}
    classes = {name: accelerated_class(plain[name]) for name in plain if name not in skipped}
    for name, cls in classes.items():
        plain[name].fused = Fused()
        plain[name].__class__ = cls
    if skipped:
        listed = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        warnings.warn(f"not accelerated: {listed}", stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give accelerated layers PEFT's own classes back, in place; returns the model.

    Raises ValueError where something wrapped a layer's forward since, for that holds on to ours.
    """
    layers = _accelerated_layers(model)
    wrapped = [name for name, layer in layers.items() if "forward" in vars(layer)]
    if wrapped:
        raise ValueError(
            f"the forward of {wrapped[0]} was replaced on the layer itself after accelerate; take "
            "that off first, for example with accelerate.hooks.remove_hook_from_module"
        )
    for layer in layers.values():
        del layer.fused
        layer.__class__ = type(layer).__bases__[1]
    return model


def peft_lines(model: nn.Module) -> list[str]:
    """A line for each PEFT layer: how its forwards ran, or why it is not accelerated."""
    if "peft" not in sys.modules:
        return []
    accelerated = _accelerated_layers(model)
    lines = []
    for name, layer in _peft_layers(model).items():
        if name in accelerated:
            lines.append(f"{name}: accelerated, {_calls(layer)}")
        elif _is_ours(layer):
            lines.append(f"{name}: on the operator, by register_with_peft")
        else:
            why = _why_not(layer) or "accelerate was not called since it is there"
            lines.append(f"{name}: not accelerated, {why}")
    return lines


def fused_calls(model: nn.Module) -> tuple[int, int]:
    """(eager forwards of accelerated layers on the operator, all of their eager forwards)."""
    from decomp_kernels.interop.peft.accelerated import FUSED

    counts = [layer.fused.calls for layer in _accelerated_layers(model).values()]
    return sum(calls[FUSED] for calls in counts), sum(calls.total() for calls in counts)


def _calls(layer: Any) -> str:
    from decomp_kernels.interop.peft.accelerated import FUSED

    fused = layer.fused.calls[FUSED]
    others = [f"{count} {why}" for why, count in layer.fused.calls.items() if why != FUSED]
    return f"{fused} fused" + (f", PEFT's own: {', '.join(others)}" if others else "")


def _is_ours(layer: nn.Module) -> bool:
    """Whether its method is one that register_with_peft entered, which has no other forward."""
    from decomp_kernels.interop.peft.tuner_layer import DecomposedTunerLayer

    return isinstance(layer, DecomposedTunerLayer)


def _why_not(layer: nn.Module) -> str | None:
    from decomp_kernels.interop.peft.accelerated import class_name
    from decomp_kernels.interop.peft.layers import accelerated_class

    if "forward" in vars(layer):
        return "its forward was replaced on the layer itself"
    if accelerated_class(layer) is None:
        return f"there is no form for {class_name(layer)}"
    return None


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError(
            "accelerate works on PEFT's models, and peft is not installed: pip install peft, or "
            "use decomp_kernels.adapt on a plain model"
        ) from error
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _accelerated_layers(model: nn.Module) -> dict[str, Any]:
    if "peft" not in sys.modules:
        return {}
    from decomp_kernels.interop.peft.accelerated import Accelerated

    return {name: m for name, m in model.named_modules() if isinstance(m, Accelerated)}
