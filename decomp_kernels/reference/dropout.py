"""The dropout mask, the definition.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") read as a
counter.  For element i of a row-major [M, K] tensor, i = row * K + column:

    word  = mix64(seed + (i // 4 + 1) * 0x9E3779B97F4A7C15  mod 2^64)
    lane  = the 16 bits of word at 16 * (i % 4)
    kept  iff  lane >= round(p * 65536),    divided by the exact kept fraction

so a mask is never stored: it is drawn again wherever it is needed.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX2 = 0x94D049BB133111EB - (1 << 64)


def threshold(p: float) -> int:
    """The number of the 65,536 lane values that are dropped."""
    return round(p * 65536)


def kept_fraction(p: float) -> float:
    return 1.0 - threshold(p) / 65536


def keep_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """bool [M, K], True where the element is kept.  seed: int64 scalar tensor."""
    M, K = shape
    index = torch.arange(M * K, dtype=torch.int64, device=seed.device)
    z = seed + (index // 4 + 1) * GOLDEN  # int64 wraps round: arithmetic modulo 2^64
    z = (z ^ _shift_right(z, 30)) * MIX1
    z = (z ^ _shift_right(z, 27)) * MIX2
    z = z ^ _shift_right(z, 31)
    lane = (z >> (16 * (index % 4))) & 0xFFFF
    return (lane >= threshold(p)).view(M, K)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Torch's >> on int64 copies the sign bit; the definition shifts zeros in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
