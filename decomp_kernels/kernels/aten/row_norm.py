"""Row norms of W + scale * B A without B A (maths: reference/row_norm.py).

    n^2 = ||W||^2 + scale * sum_r B * (2 U + scale * B G)        U = W A^T [N, r]   G = A A^T [r, r]

One read of W.  ||W||^2 is the caller's to keep: the weight is frozen.  The difference cancels only
where W is close to -scale * B A; there n is clamped at 0.
"""

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm


def squared_rows(weight: Tensor) -> Tensor:
    """||W_j||^2 [N], float32 or wider, with no wide copy of W."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    for rows in gemm.row_blocks(weight):
        out[rows] = (
            weight[rows].to(wide).square_().sum(1)
            if weight.dtype != wide
            else (weight[rows].square().sum(1))
        )
    return out


def forward(weight: Tensor, weight_sq: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """n [N], float32 or wider."""
    wide = weight_sq.dtype
    U = gemm.project(weight, down.T).to(wide)
    return _squared(weight_sq, U, down.to(wide), up.to(wide), scale).clamp_min_(0).sqrt_()


def backward(
    d_norm: Tensor, norm: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(d_down, d_up), float32 or wider: two reads of W, no N x K tensor."""
    wide = norm.dtype
    A, B = down.to(wide), up.to(wide)
    share = (d_norm / norm)[:, None]
    U = gemm.project(weight, down.T).to(wide)
    d_up = scale * share * (U + scale * (B @ (A @ A.T)))
    left = (scale * share * B).T
    d_down = torch.empty_like(A)
    if weight.dtype == wide:
        torch.mm(left, weight, out=d_down)
    else:
        d_down.zero_()
        for rows in gemm.row_blocks(weight):
            d_down.addmm_(left[:, rows], weight[rows].to(wide))
    return d_down.add_(scale * (left @ B) @ A), d_up


def _squared(weight_sq: Tensor, U: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    inner = torch.addmm(U, B, A @ A.T, beta=2.0, alpha=scale)
    return weight_sq + scale * inner.mul_(B).sum(1)
