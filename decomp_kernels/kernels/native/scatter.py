"""W_eff = W with values added at (rows, cols), and their gradients (maths: reference/scatter.py).

The gradients are dot products of the native library, each of two columns that are laid side by
side first.
"""

import torch
from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.factors import Scatter


def build(m: Scatter, weight: Tensor) -> Tensor:
    values = m.values
    if values.dtype == torch.float16:  # over a quantized weight that is multiplied in another dtype
        values = values.to(torch.float32)
    return native_library.ops().scattered_sum(
        weight.contiguous(), m.rows.contiguous(), m.cols.contiguous(), values.contiguous()
    )


def contract(m: Scatter, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    left, right = (t.T.contiguous() for t in (g, x.to(g.dtype)))
    total = native_library.ops().sampled_products(
        left, right, m.rows.contiguous(), m.cols.contiguous()
    )
    return total.to(m.values.dtype)
