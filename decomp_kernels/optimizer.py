"""What an optimizer is given: groups over the parameters that train, and a decay of scales to 1."""

from typing import Any

import torch
from torch import nn

from decomp_kernels.methods.base import Adapter


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
    for what, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("loraplus_lr_ratio", loraplus_lr_ratio),
    ):
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{what} must be a number of at least 0, got {value!r}")
    matrices, ups, scales, rest = [], [], [], []
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        path, _, last = name.rpartition(".")
        ours = isinstance(model.get_submodule(path), Adapter)
        if ours and last == "up":
            ups.append(tensor)
        elif ours and last in ("in_scale", "out_scale"):
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
