"""Tensors that lie in parts on several processes, known apart and put together.

DTensor (FSDP2, tensor parallel) and DeepSpeed's ZeRO-3.  Neither is imported here: half a second of
imports, and whoever has such a tensor has imported it.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether this process has a part of the tensor only, or holds it as one of several."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return True
    # ZeRO-3 leaves an empty tensor, and puts all values there while a module runs.
    elements = getattr(tensor, "ds_numel", None)
    return elements is not None and elements != tensor.numel()


def has_shards(model: nn.Module) -> bool:
    return bool(_units(model)) or any(is_sharded(tensor) for tensor in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every process, by a collective that all of them must join."""
    sharded: Any = tensor
    if not is_sharded(tensor):
        return tensor
    if hasattr(tensor, "ds_numel"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return sharded.full_tensor()


def writes() -> bool:
    """Whether this process is the one that writes what all have gathered."""
    return torch.distributed.get_rank() == 0


def reshard(model: nn.Module) -> None:
    """Back to FSDP2's shards, in the dtype that is trained, what a forward has left gathered."""
    for unit in _units(model):
        unit.reshard()


def check_one_process(model: nn.Module, doing: str) -> None:
    """Raise RuntimeError where the model lies in shards, which ``doing`` cannot be with."""
    if has_shards(model):
        raise RuntimeError(
            f"the model's parameters lie in shards on several processes: {doing} must come before "
            "fully_shard, parallelize_module or DeepSpeed; or save_adapter on all ranks, and do it "
            "in a process with the whole model"
        )


def _units(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 gathers, each at once."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return []
    parts: list[Any] = list(model.modules())
    if any(isinstance(part, module.FullyShardedDataParallel) for part in parts):
        raise RuntimeError(
            "the model is in FullyShardedDataParallel (FSDP1), which flattens parameters; use "
            "FSDP2: torch.distributed.fsdp.fully_shard"
        )
    return [part for part in parts if isinstance(part, module.FSDPModule)]
