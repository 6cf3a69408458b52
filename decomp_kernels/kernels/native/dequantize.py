"""Quantised weights to dense ones by the native library (maths: reference/dequantize.py).

Its kernels write float32 and bfloat16; for another dtype the operator raises.
"""

import torch
from torch import Tensor

from decomp_kernels import native_library


def forward(
    weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    return native_library.ops().dequantize(weight, weight_scale, weight_format, rows, cols, dtype)
