"""Dropout's mask in library calls (definition: reference/dropout.py).

A word holds four 16-bit lanes in element order, so a word tensor viewed as int16 is the lane
tensor of a little-endian machine.  The mask is 0 or 1 in int16, and is applied to the bits of x:
integer multiplies on 16-bit elements are several times cheaper than where() on bf16.
"""

import sys

import torch
from torch import Tensor

from decomp_kernels.reference.dropout import GOLDEN, MIX1, MIX2, threshold

_FLIP = 0x8000800080008000 - (1 << 64)  # makes the unsigned order of the lanes the signed one
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

BLOCK_ELEMENTS = 1 << 18  # elements a block: the two word buffers are 512 KiB each


def keep(seed: Tensor, rows: slice, cols: int, p: float) -> Tensor:
    """int16 [rows, cols] of 0 and 1: the mask of those rows of a [M, cols] tensor."""
    first, last = rows.start * cols, rows.stop * cols
    first_word, last_word = first // 4, -(-last // 4)
    counter = torch.arange(first_word + 1, last_word + 1, dtype=torch.int64, device=seed.device)
    z = torch.add(seed, counter, alpha=GOLDEN)
    t = z >> 30
    z = z.bitwise_xor_(t.bitwise_and_((1 << 34) - 1)).mul_(MIX1)
    torch.bitwise_right_shift(z, 27, out=t)
    z = z.bitwise_xor_(t.bitwise_and_((1 << 37) - 1)).mul_(MIX2)
    torch.bitwise_right_shift(z, 31, out=t)
    z = z.bitwise_xor_(t.bitwise_and_((1 << 33) - 1)).bitwise_xor_(_FLIP)
    lanes = z.view(torch.int16)
    if sys.byteorder == "big":
        lanes = lanes.view(-1, 4).flip(1).reshape(-1)
    lowest_kept = threshold(p) - 32768
    lanes = lanes.clamp_(lowest_kept - 1, lowest_kept).sub_(lowest_kept - 1)
    return lanes[first - 4 * first_word : last - 4 * first_word].view(-1, cols)


def apply(x: Tensor, kept: Tensor, out: Tensor | None = None) -> Tensor:
    """x where the mask is 1 and 0 elsewhere, not divided by the kept fraction; into ``out``."""
    bits = _BITS[x.element_size()]
    out = torch.empty_like(x) if out is None else out
    torch.mul(x.view(bits), kept.to(bits), out=out.view(bits))
    return out
