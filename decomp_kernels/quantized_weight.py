"""A frozen weight W [N, K] as codes and scales, where layers and operators take a dense one.

    "nf4"   codes uint8 [N, K / 2], two a byte      scale: the absmax of each block of elements
    "int8"  codes int8 [N, K]                       scale [N]: the absmax of each row

Formulas: reference/dequantize.py.  A scale that is quantised itself (QLoRA, arXiv 2305.14314,
"double quantization") stays so: what stands in memory, and is kept for backward, is its codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NESTED_BLOCK = 256


@dataclass(frozen=True, eq=False)
class NestedScale:
    """absmax_i = levels[codes_i] * absmax[i // 256] + offset, float32.

    codes uint8 [blocks of W], levels float32 [256], absmax float32 [ceil(blocks / 256)], offset
    float32 scalar.
    """

    codes: Tensor
    levels: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """dtype: of the dense weight that it stands for; it is multiplied in the dtype of x.

    K of nf4 is even.  scale: float32, or a NestedScale of nf4.
    """

    codes: Tensor
    scale: Tensor | NestedScale
    format: str
    dtype: torch.dtype

    requires_grad = False

    @property
    def shape(self) -> torch.Size:
        """(N, K) of the weight."""
        return dense_shape(self.codes, self.format)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dim(self) -> int:
        """2."""
        return self.codes.dim()

    def numel(self) -> int:
        """N K."""
        return self.shape.numel()

    def detach(self) -> "QuantizedWeight":
        """Itself: it never has a gradient."""
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it consists of: codes, and the scale in one part or four."""
        if isinstance(self.scale, Tensor):
            return self.codes, self.scale
        nested = self.scale
        return self.codes, nested.codes, nested.levels, nested.absmax, nested.offset


def scale_of(parts: tuple[Tensor, ...]) -> Tensor | NestedScale:
    """The scale of these parts: ``QuantizedWeight.tensors`` without the first."""
    return parts[0] if len(parts) == 1 else NestedScale(*parts)


def dense_shape(codes: Tensor, weight_format: str) -> torch.Size:
    """(N, K) of the weight that ``codes`` are."""
    rows, width = codes.shape
    return torch.Size((rows, 2 * width if weight_format == "nf4" else width))


def absmax(scale: Tensor | NestedScale) -> Tensor:
    """The float32 absmax of each block, dense."""
    if isinstance(scale, Tensor):
        return scale
    values = scale.levels[scale.codes.int()]
    return values * scale.absmax.repeat_interleave(NESTED_BLOCK)[: len(values)] + scale.offset
