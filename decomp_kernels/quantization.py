"""Quantise the linears of a model in place: QLoRA's base for machines without bitsandbytes."""

import warnings
from typing import Any

import torch
from torch import nn

from decomp_kernels.linear import Decomposed
from decomp_kernels.ops.quantize import check_format
from decomp_kernels.quantized import is_quantized
from decomp_kernels.quantized_linear import QuantizedLinear
from decomp_kernels.saved_modules import replace_module
from decomp_kernels.sharding import check_one_process
from decomp_kernels.targets import find_targets


def quantize(
    model: nn.Module,
    weight_format: str = "nf4",
    target_modules: str | list[str] | tuple[str, ...] | set[str] = "all-linear",
    *,
    exclude_modules: str | list[str] | None = None,
    block_size: int | None = None,
) -> nn.Module:
    """Replace nn.Linear modules of ``model`` by QuantizedLinear ones, in place; returns ``model``.

    weight_format: "nf4", with one scale for each block_size elements (a power of two, 64 by
    default), or "int8", with one for each row.  target_modules, exclude_modules: as of ``adapt``;
    "all-linear" leaves the language-model head out.  Modules that match but cannot be quantised are
    named in a warning.  Raises ValueError, with nothing changed, where none can or a weight is not
    finite.  Then adapt the model: what is quantised is frozen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_format(weight_format, block_size)
    check_one_process(model, "quantising")
    targets = find_targets(model, target_modules, exclude_modules, ())
    reasons = {name: _why_not(module, weight_format) for name, module in targets.modules.items()}
    skipped = targets.skipped | {name: reason for name, reason in reasons.items() if reason}
    chosen: dict[str, Any] = {name: targets.modules[name] for name in reasons if not reasons[name]}
    listed = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    if not chosen:
        raise ValueError(f"no module can be quantised: {listed}")
    for name, module in chosen.items():
        if module.weight.device.type == "meta" or not torch.isfinite(module.weight).all():
            raise ValueError(
                f"the weight of {name} must be loaded and finite to be quantised; nothing was "
                "changed; load it first, or exclude this module"
            )
    if skipped:
        warnings.warn(f"not quantised: {listed}", stacklevel=2)
    for name, module in chosen.items():
        made = QuantizedLinear.from_linear(module, weight_format, block_size=block_size)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            made.register_forward_hook(_called)
        replace_module(model, module, made.requires_grad_(False))
    return model


def _why_not(module: nn.Module, weight_format: str) -> str | None:
    if isinstance(module, Decomposed):
        return "it is adapted already: quantise first, then adapt"
    if is_quantized(module):
        return "it is quantised already"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}; only nn.Linear is quantised"
    if weight_format == "nf4" and module.in_features % 2:
        return f"its in_features are odd, {module.in_features}, and nf4 has two to a byte; use int8"
    return None


def _called(*_: Any) -> None:
    """A forward hook that does nothing: with one inside it, nn.TransformerEncoderLayer calls its
    linears in evaluation too, and does not hand their weights to a library call for dense ones.
    """
