"""W_eff = W, and W_eff[rows_j, cols_j] += values_j, the definition.

    W [N, K]   rows, cols int64 [nnz], no pair twice   values [nnz]

    d_values_j = sum_m g[m, rows_j] x[m, cols_j]

Computed in float32, or float64 where W is float64, and rounded once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Scatter


def build(m: Scatter, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    changed = weight[m.rows, m.cols].to(wide) + m.values.to(wide)
    return weight.index_put((m.rows, m.cols), changed.to(weight.dtype))


def contract(m: Scatter, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """d_values of g [M, N] and x [M, K]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    P = g.to(wide).T @ x.to(wide)
    return P[m.rows, m.cols].to(m.values.dtype)
