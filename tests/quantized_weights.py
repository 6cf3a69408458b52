"""Quantised weights for tests, and the dense ones that they are, computed by the definition."""

import torch
from torch import Tensor

from decomp_kernels.quantized_weight import NestedScale, QuantizedWeight
from decomp_kernels.reference import dequantize as reference

FORMATS = ("nf4", "nf4 nested", "int8")


def random_weight(kind: str, N: int, K: int, dtype: torch.dtype, block: int = 64):
    """codes of every value, scales that differ from block to block."""
    if kind == "int8":
        codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        return QuantizedWeight(codes, torch.rand(N) + 0.1, "int8", dtype)
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    blocks = -(-N * K // block)
    scale: Tensor | NestedScale = torch.rand(blocks) + 0.1
    if kind == "nf4 nested":
        scale = NestedScale(
            torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            torch.rand(256) - 0.5,
            torch.rand(-(-blocks // 256)),
            torch.tensor(1.5),
        )
    return QuantizedWeight(codes, scale, "nf4", dtype)


def by_definition(weight: QuantizedWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """[N, K], by the formulas alone."""
    scale = weight.scale
    if isinstance(scale, NestedScale):
        blocks = range(len(scale.codes))
        scale = torch.stack(
            [
                scale.levels[int(scale.codes[i])] * scale.absmax[i // 256] + scale.offset
                for i in blocks
            ]
        )
    N, K = weight.codes.shape
    K = 2 * K if weight.format == "nf4" else K
    return reference.forward(weight.codes, scale, weight.format, N, K, dtype)
