"""W_eff = W * (1 + s B A), the definition.

    W [N, K]   B = up [N, r]   A = down [r, K]   s = scale

With P = g^T x [N, K], the gradient of W_eff, and Q = W * P:

    dB = s Q A^T        dA = s B^T Q

Computed in float32, or float64 where W is float64, and rounded once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Hadamard


def build(m: Hadamard, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = m.up.to(wide) @ m.down.to(wide)
    return (weight.to(wide) * (1 + m.scale * product)).to(weight.dtype)


def contract(m: Hadamard, weight: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d_up, d_down) of g [M, N] and x [M, K]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    Q = weight.to(wide) * (g.to(wide).T @ x.to(wide))
    d_up = m.scale * (Q @ m.down.to(wide).T)
    d_down = m.scale * (m.up.to(wide).T @ Q)
    return d_up.to(m.up.dtype), d_down.to(m.down.dtype)
