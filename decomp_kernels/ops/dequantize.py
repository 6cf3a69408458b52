"""Quantised weights to dense ones as an operator: schema, fake, dispatch.

Formats and formulas: reference/dequantize.py.  A quantised weight is frozen: there is no gradient.
"""

import torch
from torch import Tensor

from decomp_kernels.dispatch import Work
from decomp_kernels.kernels.aten import dequantize as aten
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.reference import dequantize as reference
from decomp_kernels.reference.dequantize import FORMATS, SMALLEST_BLOCK, block_size
from decomp_kernels.tables import width

_FILES = files(native="dequantize")
_CODES = {"nf4": torch.uint8, "int8": torch.int8}

torch.library.define(
    "decomp_kernels::dequantize",
    "(Tensor weight, Tensor weight_scale, str weight_format, SymInt rows, SymInt cols,"
    " ScalarType dtype, str impl) -> Tensor",
)


@torch.library.impl("decomp_kernels::dequantize", "CompositeExplicitAutograd")
def _dequantize(weight, weight_scale, weight_format, rows, cols, dtype, impl):
    def work() -> Work:
        kind = width(dtype == torch.float32)
        return Work("dequantize", "forward", rows, rows * cols, 0, kind, kind)

    like = weight.new_empty(0, dtype=dtype)  # what is made decides which kernels can
    chosen = implementation(like, impl, reference, aten, _FILES, work)
    return chosen.forward(weight, weight_scale, weight_format, rows, cols, dtype)


@torch.library.register_fake("decomp_kernels::dequantize")
def _dequantize_fake(weight, weight_scale, weight_format, rows, cols, dtype, impl):
    return weight.new_empty((rows, cols), dtype=dtype)


op = torch.ops.decomp_kernels.dequantize.default


def dequantize(
    weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """The dense weight [N, K] = ``shape`` in ``dtype``, of the codes in ``weight``.

    weight_format "nf4": weight is uint8 with ceil(N * K / 2) bytes of any shape, weight_scale the
    float32 absmax of each block of consecutive elements; a block has 32, 64, 128, ... elements,
    the size that makes their number fit.  "int8": weight is int8 [N, K], weight_scale the float32
    absmax of each row, [N] or [N, 1].  An absmax that is quantised itself must be dense first.
    Raises ValueError or TypeError where the arguments do not fit.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (N, K), got {tuple(shape)}")
    check_format(weight, weight_scale, weight_format, shape)
    N, K = shape
    scales = weight_scale.detach().flatten()
    return op(weight.contiguous(), scales, weight_format, N, K, dtype, impl)


def check_format(
    weight: Tensor, weight_scale: Tensor, weight_format: str, shape: tuple[int, int]
) -> None:
    """Raise ValueError or TypeError where codes and scales are none of that format and shape."""
    if weight_format not in FORMATS:
        raise ValueError(
            f"weight_format must be one of {', '.join(FORMATS)}, got {weight_format!r}"
        )
    if weight.dtype != _CODES[weight_format]:
        raise TypeError(
            f"weight must be {_CODES[weight_format]} for {weight_format}, got {weight.dtype}"
        )
    if weight_scale.dtype != torch.float32:
        raise TypeError(f"weight_scale must be float32, got {weight_scale.dtype}")
    if weight_scale.device != weight.device:
        raise ValueError(
            f"weight_scale must be on weight's device {weight.device}, got {weight_scale.device}"
        )
    N, K = shape
    if weight_format == "nf4":
        _check_nf4(weight, weight_scale, N * K)
    elif weight.shape != (N, K) or weight_scale.shape not in ((N,), (N, 1)):
        raise ValueError(
            f"int8 of shape {(N, K)} has weight {(N, K)} and weight_scale {(N,)}, got "
            f"{tuple(weight.shape)} and {tuple(weight_scale.shape)}"
        )


def _check_nf4(weight: Tensor, weight_scale: Tensor, elements: int) -> None:
    if weight.numel() != (elements + 1) // 2:
        raise ValueError(
            f"nf4 of {elements} elements has {(elements + 1) // 2} bytes, got {weight.numel()}"
        )
    if block_size(elements, weight_scale.numel()) is None:
        raise ValueError(
            f"weight_scale must have one absmax for each block of {SMALLEST_BLOCK}, "
            f"{2 * SMALLEST_BLOCK}, {4 * SMALLEST_BLOCK}, ... of the {elements} elements, got "
            f"{weight_scale.numel()}"
        )
