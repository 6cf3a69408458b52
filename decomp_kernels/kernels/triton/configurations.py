"""Which tile a Triton kernel runs with: an entry of its table, configs/<kernel>.json (tables.py).

An entry's ``adapter`` is "float32" or "narrow" as the rank-r operand is (none fits both: float32
takes more registers).  ``warpgroup``: in bf16 the products run on a whole warp group's matrix unit
(sm_90, sm_100).
"""

from typing import Any

import torch

from decomp_kernels import dispatch, tables


def configuration(
    kernel: str, device: torch.device, adapter: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """Tile sizes and launch options of ``kernel`` for these sizes on this device."""
    arch = dispatch.architecture(device)
    return tables.first(kernel, arch, sizes, adapter=width(adapter == torch.float32))["config"]


def width(float32: bool) -> str:
    """A dtype as tables have it."""
    return "float32" if float32 else "narrow"
