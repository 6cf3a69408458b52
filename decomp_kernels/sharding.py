"""Tensors that lie in shards on several processes (DTensor: FSDP2, tensor parallel), known apart.

``torch.distributed.tensor`` is half a second of imports: who has such a tensor has imported it.
"""

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor: a tensor of which this process holds a shard or a replica."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(model: nn.Module) -> bool:
    return any(is_sharded(tensor) for tensor in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on every process; of a DTensor by a collective that all of them must join."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Back to FSDP2's shards, in the dtype that is trained, what a forward has left gathered."""
    module = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if module is not None else ():
        if isinstance(part, module.FSDPModule):  # type: ignore[union-attr]
            part.reshard()
