"""Row norms of an updated weight, the definition.  n_j = || (W + scale * B A)_j ||_2

    W [N, K]   A = down [r, K]   B = up [N, r]   n [N]

    dV = (dn / n)[:, None] * V,  V = W + scale * B A     dB = scale * dV A^T     dA = scale * B^T dV

Computed in float32, or float64 where W is float64, from V itself: this is the oracle.
"""

import torch
from torch import Tensor


def forward(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """n [N], float32 or wider."""
    return torch.linalg.vector_norm(_updated(weight, down, up, scale), dim=1)


def backward(
    d_norm: Tensor, norm: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(d_down, d_up), float32 or wider."""
    updated = _updated(weight, down, up, scale)
    d_updated = (d_norm / norm)[:, None] * updated
    wide = updated.dtype
    return scale * (up.to(wide).T @ d_updated), scale * (d_updated @ down.to(wide).T)


def _updated(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + scale * (up.to(wide) @ down.to(wide))
