"""y = x (C kron D)^T as batched GEMMs in row blocks (maths: reference/kron.py).

2 M (K c + N b) operations for K = b d, N = a c.  Factors wider than x keep their precision: x is
converted block by block, never as a whole.  The factors' gradients are products of each token's
[a, c], [b, c] and [b, d] matrices, summed over the tokens in float32: nothing is transposed in
memory, and no sum is so long that float32 shows it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm


def forward(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    compute = _compute_dtype(x, left, right)
    C, D = left.to(compute), right.to(compute)
    (a, b), (c, d) = C.shape, D.shape
    x = x.contiguous()
    y = x.new_empty(x.shape[0], a * c)
    for rows in _row_blocks(x, a * c, b * d):
        H = (x[rows].to(compute).view(-1, d) @ D.T).view(-1, b, c)
        y[rows] = (C @ H).view(-1, a * c)
    return y


def backward(
    dy: Tensor, x: Tensor | None, left: Tensor, right: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_left, need_right = needs
    compute = _compute_dtype(dy, left, right)
    C, D = left.to(compute), right.to(compute)
    (a, b), (c, d) = C.shape, D.shape
    dy, x = dy.contiguous(), None if x is None else x.contiguous()
    dx = dy.new_empty(dy.shape[0], b * d) if need_x else None
    wide = torch.promote_types(compute, torch.float32)
    d_left = C.new_zeros(a, b, dtype=wide) if need_left else None
    d_right = D.new_zeros(c, d, dtype=wide) if need_right else None
    for rows in _row_blocks(dy, a * c, b * d, a * b, c * d):
        dY = dy[rows].to(compute).view(-1, a, c)
        X = None if x is None else x[rows].to(compute).view(-1, b, d)
        if d_left is not None and X is not None:
            H = (X.view(-1, d) @ D.T).view(-1, b, c)
            d_left += torch.bmm(dY, H.mT).sum(0, dtype=wide)
        if dx is None and d_right is None:
            continue
        dH = C.T @ dY  # [rows, b, c]
        if dx is not None:
            dx[rows] = (dH.view(-1, c) @ D).view(-1, b * d)
        if d_right is not None and X is not None:
            d_right += torch.bmm(dH.mT, X).sum(0, dtype=wide)
    return (
        dx,
        None if d_left is None else d_left.to(left.dtype),
        None if d_right is None else d_right.to(right.dtype),
    )


def _compute_dtype(x: Tensor, left: Tensor, right: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.promote_types(left.dtype, right.dtype))


def _row_blocks(of: Tensor, *widths: int) -> Iterator[slice]:
    return gemm.row_blocks(of, gemm.OUTER_ELEMENTS, max(widths))
