"""W_eff = W * (1 + s B A) in row blocks of W (maths: reference/hadamard.py).

A block is float32 in cache and is rounded once as it is stored; P = g^T x exists one block at a
time, in x's dtype as autograd would round it, and is contracted at once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Hadamard
from decomp_kernels.kernels import gemm


def build(m: Hadamard, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    up, down = m.up.to(wide), m.down.to(wide)
    one = torch.ones(1, dtype=wide, device=weight.device)
    built = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(weight):
        factor = torch.addmm(one, up[rows], down, alpha=m.scale)
        built[rows] = factor.mul_(weight[rows])
    return built


def contract(m: Hadamard, weight: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    up, down = m.up.to(wide), m.down.to(wide)
    d_up, d_down = up.new_empty(up.shape), down.new_zeros(down.shape)
    for rows, P in gemm.outer_blocks(g, x):
        Q = torch.mul(P.to(wide), weight[rows])
        torch.mm(Q, down.T, out=d_up[rows])
        d_down.addmm_(up[rows].T, Q)
    return (
        d_up.mul_(m.scale).to(m.up.dtype),
        d_down.mul_(m.scale).to(m.down.dtype),
    )
