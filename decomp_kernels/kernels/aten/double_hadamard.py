"""W_eff = W + s (B1 A1) * (B2 A2) in row blocks of W (maths: reference/double_hadamard.py).

A block is float32 in cache and is rounded once as it is stored; P = g^T x exists one block at a
time, in x's dtype as autograd would round it, and is contracted at once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import DoubleHadamard
from decomp_kernels.kernels import gemm


def build(m: DoubleHadamard, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    up1, down1, up2, down2 = (t.to(wide) for t in (m.up1, m.down1, m.up2, m.down2))
    built = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(weight):
        first = (up1[rows] * m.scale) @ down1
        second = up2[rows] @ down2
        built[rows] = first.mul_(second).add_(weight[rows])
    return built


def contract(
    m: DoubleHadamard, weight: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    up1, down1, up2, down2 = (t.to(wide) for t in (m.up1, m.down1, m.up2, m.down2))
    d_up1, d_up2 = up1.new_empty(up1.shape), up2.new_empty(up2.shape)
    d_down1, d_down2 = down1.new_zeros(down1.shape), down2.new_zeros(down2.shape)
    for rows, block in gemm.outer_blocks(g, x):
        P = block.to(wide)
        T = (up2[rows] @ down2).mul_(P)
        torch.mm(T, down1.T, out=d_up1[rows])
        d_down1.addmm_(up1[rows].T, T)
        torch.mm(up1[rows], down1, out=T).mul_(P)
        torch.mm(T, down2.T, out=d_up2[rows])
        d_down2.addmm_(up2[rows].T, T)
    return (
        d_up1.mul_(m.scale).to(m.up1.dtype),
        d_down1.mul_(m.scale).to(m.down1.dtype),
        d_up2.mul_(m.scale).to(m.up2.dtype),
        d_down2.mul_(m.scale).to(m.down2.dtype),
    )
