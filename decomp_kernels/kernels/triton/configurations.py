"""Which tile a Triton kernel runs with: the first entry of configs/<kernel>.json that fits.

An entry fits where its ``arch`` is the device's ("any" fits all), its ``adapter`` is "float32" or
"narrow" as the rank-r operand is (none fits both: float32 takes more registers), and every limit in
its ``when`` ({"M_max": 16, "r_max": 32}) holds.  ``measured``: on what, or false if on nothing.
``warpgroup``: in bf16 the products run on a whole warp group's matrix unit (sm_90, sm_100).
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from decomp_kernels import dispatch


def configuration(
    kernel: str, device: torch.device, adapter: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """Tile sizes and launch options of ``kernel`` for these sizes on this device."""
    arch = dispatch.architecture(device)
    for entry in entries(kernel):
        limits = entry["when"].items()
        if (
            entry["arch"] in (arch, "any")
            and suits(entry, adapter == torch.float32)
            and all(sizes[limit.removesuffix("_max")] <= most for limit, most in limits)
        ):
            return entry["config"]
    raise LookupError(f"configs/{kernel}.json has no entry for any size; its last must have none")


def suits(entry: dict[str, Any], float32: bool) -> bool:
    """Whether an entry is for rank-r operands of that width."""
    kind = "float32" if float32 else "narrow"
    return entry.get("adapter", kind) == kind


@cache
def entries(kernel: str) -> list[dict[str, Any]]:
    path = files("decomp_kernels.kernels").joinpath(f"configs/{kernel}.json")
    return json.loads(path.read_text())["entries"]
