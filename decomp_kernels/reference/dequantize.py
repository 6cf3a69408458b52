"""Quantised weights, the definition.  w = level[code] * absmax, or code * (absmax / 127)

    "nf4"   4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E).  uint8, two codes a byte, the
            first in the high four bits; elements in row-major order.  One absmax for each block of
            consecutive elements, which may span rows.
    "int8"  LLM.int8() (arXiv 2208.07339).  int8 [N, K], one absmax for each row.

Block sizes of nf4 are powers of two, at least 32.  A count of two blocks or more fits one of them
only, and all of them mean the same to a single block: so the count says the size.

Computed in float32, or float64 where that is asked for, and rounded once: this is the oracle.
"""

import torch
from torch import Tensor

FORMATS = ("nf4", "int8")
SMALLEST_BLOCK = 32

# float32 numbers, exactly.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def block_size(elements: int, blocks: int) -> int | None:
    """Elements of each block but the last, where ``elements`` make that many; None: they cannot."""
    size = SMALLEST_BLOCK
    while -(-elements // size) > max(blocks, 1):
        size *= 2
    return size if -(-elements // size) == blocks else None


def forward(
    weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """w [rows, cols] in ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    absmax = weight_scale.to(wide)
    if weight_format == "int8":
        return (weight.to(wide) * (absmax / 127)[:, None]).to(dtype)
    codes = torch.stack((weight.flatten() >> 4, weight.flatten() & 15), dim=1).flatten()
    codes = codes[: rows * cols].long()
    levels = torch.tensor(LEVELS, dtype=wide, device=weight.device)[codes]
    size = block_size(rows * cols, absmax.numel())
    assert size is not None  # the public function has seen to that
    of_each = absmax.flatten().repeat_interleave(size)[: rows * cols]
    return (levels * of_each).view(rows, cols).to(dtype)
