"""Dense weights to quantised ones (definition: reference/quantize.py), in blocks of rows.

It is done once and has no gradient, so it is no operator of torch's.
"""

from math import gcd

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.ops.tiled_weight import slices
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.reference import quantize as reference
from decomp_kernels.reference.dequantize import FORMATS, SMALLEST_BLOCK

_ELEMENTS = 1 << 20  # of a block of rows: temporaries of about 20 MiB


@torch.no_grad()
def quantize_weight(
    weight: Tensor, weight_format: str, *, block_size: int | None = None
) -> QuantizedWeight:
    """The nearest "nf4" or "int8" weight of a dense one [N, K].

    block_size: elements with one absmax of "nf4", a power of two from 32 on, 64 by default; int8
    has one for each row.  Raises ValueError or TypeError where the weight cannot be quantised.
    """
    check_format(weight_format, block_size)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"weight must be a floating point matrix, got {weight.dtype} {tuple(weight.shape)}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("weight must be finite to be quantised, and it holds NaN or infinity")
    if weight_format == "nf4" and weight.shape[1] % 2:
        raise ValueError(
            f"nf4 needs an even number of columns, two to a byte, got {weight.shape[1]}; use int8"
        )
    N, K = weight.shape
    nf4 = weight_format == "nf4"
    whole = max(SMALLEST_BLOCK, 1 << (N * K - 1).bit_length())  # a block is made in full
    size = min(block_size or 64, whole) if nf4 else K
    codes = torch.empty(
        N, K // 2 if nf4 else K, dtype=torch.uint8 if nf4 else torch.int8, device=weight.device
    )
    absmax = torch.empty(-(-N * K // size), device=weight.device)
    step = dispatch.block_elements(weight.device, _ELEMENTS) // K
    for rows in slices(N, step, size // gcd(size, K)):
        blocks = slice(rows.start * K // size, -(-rows.stop * K // size))
        codes[rows], absmax[blocks] = reference.forward(weight[rows], weight_format, size)
    return QuantizedWeight(codes, absmax, weight_format, weight.dtype)


def check_format(weight_format: str, block_size: int | None) -> None:
    """Raise ValueError where there is no such format."""
    if weight_format not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {weight_format!r}")
    if block_size is None:
        return
    if weight_format == "int8":
        raise ValueError("int8 has one scale for each row: leave block_size out")
    power = type(block_size) is int and block_size & (block_size - 1) == 0
    if not power or block_size < SMALLEST_BLOCK:
        raise ValueError(
            f"block_size must be a power of two, {SMALLEST_BLOCK} or more, got {block_size!r}"
        )
