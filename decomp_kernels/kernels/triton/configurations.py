"""Which tile a Triton kernel runs with: an entry of its table, configs/<kernel>.json (tables.py).

An entry's ``adapter`` is "float32" or "narrow" as the rank-r operand is and its ``base`` as the
base weight is (none fits both: float32 takes more registers).  A tile with DESCRIPTORS is for
tensors that can have them.  ``warpgroup``: in bf16 the products run on a whole warp group's matrix
unit (sm_90, sm_100).
"""

from typing import Any

import torch

from decomp_kernels import dispatch, tables


def configuration(
    kernel: str,
    device: torch.device,
    adapter: torch.dtype,
    base: torch.dtype | None = None,
    descriptors: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Tile sizes and launch options of ``kernel`` for these sizes on this device."""
    kinds = {
        "adapter": tables.width(adapter == torch.float32),
        "base": tables.width(base == torch.float32),
    }
    entry = tables.first(
        kernel,
        dispatch.architecture(device),
        sizes,
        able=lambda entry: descriptors >= entry["config"].get("DESCRIPTORS", False),
        **kinds,
    )
    return entry["config"]
