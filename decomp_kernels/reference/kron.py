"""y = x (C kron D)^T without C kron D, the definition.

    x [M, b d]   C = left [a, b]   D = right [c, d]   y [M, a c]

With X = x as [M, b, d], Y = y as [M, a, c] and H = X D^T [M, b, c]:   Y_m = C H_m.

    dH_m = C^T dY_m     dX = dH D     dC = sum_m dY_m H_m^T     dD = sum_m dH_m^T X_m

Computed in float32, or float64 where x is float64, and rounded once.
"""

import torch
from torch import Tensor


def forward(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    X = x.to(wide).unflatten(1, (left.shape[1], right.shape[1]))
    return (left.to(wide) @ (X @ right.to(wide).T)).flatten(1).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor | None, left: Tensor, right: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, d_left, d_right), each None where ``needs`` is False; x only for the last two."""
    need_x, need_left, need_right = needs
    wide = torch.promote_types(dy.dtype, torch.float32)
    C, D = left.to(wide), right.to(wide)
    dY = dy.to(wide).unflatten(1, (C.shape[0], D.shape[0]))
    dH = C.T @ dY
    dx = (dH @ D).flatten(1).to(dy.dtype) if need_x else None
    d_left = d_right = None
    if x is not None:
        X = x.to(wide).unflatten(1, (C.shape[1], D.shape[1]))
        if need_left:
            d_left = torch.einsum("mac,mbc->ab", dY, X @ D.T).to(left.dtype)
        if need_right:
            d_right = torch.einsum("mbc,mbd->cd", dH, X).to(right.dtype)
    return dx, d_left, d_right


def dense(left: Tensor, right: Tensor) -> Tensor:
    """C kron D, [a c, b d]: for merging."""
    return torch.kron(left, right)
