"""What compiling a kernel takes when there is no tensor: the types of its arguments and constants.

Each kernel file has ``specimens(config)``: every combination of dtypes and options in which a
configuration differs as compiled code.  ``decomp-kernels inspect`` compiles them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

# name: dtypes of the large operand and of the adapter
DTYPES = {
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "fp32": ("fp32", "fp32"),
    "bf16-fp32": ("bf16", "fp32"),
    "fp16-fp32": ("fp16", "fp32"),
}


@dataclass(frozen=True)
class Specimen:
    """types: run-time arguments, "*bf16", "i32", "fp32".  constants: all others, by name.

    A type may be a tuple of its parts' types, named or not, with None where one is absent.
    unit: arguments that are 1, as the launcher makes constants of them.  uses: sizes that an
    entry's ``when`` may limit.  multiplies: has matrix products.
    """

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: bool = True  # pointers, sizes and strides are multiples of 16
    unit: tuple[str, ...] = ()
    uses: dict[str, int] = field(default_factory=dict)
    multiplies: bool = True


def is_size(name: str) -> bool:
    """Whether the launcher finds a multiple of 16 where sizes are: shares are whole blocks."""
    return name in "MNKCR" or name.startswith("stride") or name.endswith("_share")


def launch_options(config: dict[str, Any]) -> dict[str, int]:
    """maxnreg: NVIDIA's assembler else spills a little to fit more programs; AMD's has no such."""
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    if "maxnreg" in config and torch.version.hip is None:
        options["maxnreg"] = config["maxnreg"]
    return options


def tiles(config: dict[str, Any]) -> dict[str, int]:
    return {name: size for name, size in config.items() if name.startswith("BLOCK_")}
