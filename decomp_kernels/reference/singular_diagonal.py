"""W_eff = W + U diag(d) V^T, the definition.

    W [N, K]   U = left [N, k]   d = diagonal [k]   V^T = right [k, K]      U and V are frozen

With P = g^T x [N, K], the gradient of W_eff, the gradient of d is that of k scalars:

    dd_i = U_i^T P V_i = sum_m (g U)_mi (x V)_mi

Computed in float32, or float64 where W is float64, and rounded once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import SingularDiagonal


def build(m: SingularDiagonal, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = (m.left.to(wide) * m.diagonal.to(wide)) @ m.right.to(wide)
    return (weight.to(wide) + change).to(weight.dtype)


def contract(m: SingularDiagonal, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """d_diagonal of g [M, N] and x [M, K]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    P = g.to(wide).T @ x.to(wide)
    return ((m.left.to(wide).T @ P) * m.right.to(wide)).sum(1).to(m.diagonal.dtype)
