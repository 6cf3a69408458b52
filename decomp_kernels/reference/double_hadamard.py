"""W_eff = W + s (B1 A1) * (B2 A2), the definition.

    W [N, K]   B1, B2 = up1, up2 [N, r]   A1, A2 = down1, down2 [r, K]   s = scale

With P = g^T x [N, K], the gradient of W_eff, and T1 = s P * (B2 A2), T2 = s P * (B1 A1):

    dB1 = T1 A1^T     dA1 = B1^T T1     dB2 = T2 A2^T     dA2 = B2^T T2

The two products may have different ranks.  Computed in float32, or float64 where W is float64,
and rounded once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import DoubleHadamard


def build(m: DoubleHadamard, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    first = m.up1.to(wide) @ m.down1.to(wide)
    second = m.up2.to(wide) @ m.down2.to(wide)
    return (weight.to(wide) + m.scale * first * second).to(weight.dtype)


def contract(
    m: DoubleHadamard, weight: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_up1, d_down1, d_up2, d_down2) of g [M, N] and x [M, K]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    up1, down1, up2, down2 = (t.to(wide) for t in (m.up1, m.down1, m.up2, m.down2))
    P = m.scale * (g.to(wide).T @ x.to(wide))
    T1, T2 = P * (up2 @ down2), P * (up1 @ down1)
    return (
        (T1 @ down1.T).to(m.up1.dtype),
        (up1.T @ T1).to(m.down1.dtype),
        (T2 @ down2.T).to(m.up2.dtype),
        (up2.T @ T2).to(m.down2.dtype),
    )
