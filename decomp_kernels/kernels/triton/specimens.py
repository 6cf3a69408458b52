"""What compiling a kernel takes when there is no tensor: the types of its arguments and constants.

Each kernel file has ``specimens(config)``: every combination of dtypes and options in which a
configuration differs as compiled code.  ``decomp-kernels inspect`` compiles them.
"""

from dataclasses import dataclass
from typing import Any

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

    unit: arguments that are 1, as the launcher makes constants of them.  matrix: whether in bf16
    its products must be on a matrix unit.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: bool = True  # pointers, sizes and strides are multiples of 16
    unit: tuple[str, ...] = ()
    matrix: bool = True

    @property
    def sizes(self) -> list[str]:
        return [name for name in self.types if name in "MNKCR" or name.startswith("stride")]


def launch_options(config: dict[str, Any]) -> dict[str, int]:
    return {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}


def tiles(config: dict[str, Any]) -> dict[str, int]:
    return {name: size for name, size in config.items() if name.startswith("BLOCK_")}
