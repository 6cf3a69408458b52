"""Which tile a Triton kernel runs with: the first entry of configs/<kernel>.json that fits.

An entry fits where its ``arch`` is the device's ("any" fits all), its ``adapter`` is "float32" or
"narrow" as the rank-r operand is and its ``base`` as the base weight is (none fits both: float32
takes more registers), every limit in its ``when`` ({"M_max": 16, "r_max": 32}) holds, and a tile
with DESCRIPTORS meets tensors that can have them.  ``measured``: on what, or false if on nothing.
``warpgroup``: in bf16 the products run on a whole warp group's matrix unit (sm_90, sm_100).
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from decomp_kernels import dispatch


def configuration(
    kernel: str,
    device: torch.device,
    adapter: torch.dtype,
    base: torch.dtype | None = None,
    descriptors: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Tile sizes and launch options of ``kernel`` for these sizes on this device."""
    arch = dispatch.architecture(device)
    for entry in entries(kernel):
        if (
            entry["arch"] in (arch, "any")
            and suits(entry, adapter == torch.float32, base == torch.float32)
            and descriptors >= entry["config"].get("DESCRIPTORS", False)
            and within(entry, sizes)
        ):
            return entry["config"]
    raise LookupError(f"configs/{kernel}.json has no entry for any size; its last must have none")


def suits(entry: dict[str, Any], adapter: bool, base: bool) -> bool:
    """Whether an entry is for rank-r operands, and a base weight, that are float32 or are not."""
    kinds = {"adapter": "float32" if adapter else "narrow", "base": "float32" if base else "narrow"}
    return all(entry.get(operand, kind) == kind for operand, kind in kinds.items())


def within(entry: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Whether every limit of an entry holds; a size that is not given is 0."""
    limits = entry["when"].items()
    return all(sizes.get(limit.removesuffix("_max"), 0) <= most for limit, most in limits)


@cache
def entries(kernel: str) -> list[dict[str, Any]]:
    path = files("decomp_kernels.kernels").joinpath(f"configs/{kernel}.json")
    return json.loads(path.read_text())["entries"]
