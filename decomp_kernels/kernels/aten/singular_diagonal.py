"""W_eff = W + U diag(d) V^T in row blocks of W (maths: reference/singular_diagonal.py).

float32 bases are multiplied in float32.  16-bit bases are multiplied as they are, W being the
start of the GEMM's float32 accumulator: U diag(d) is rounded once and the sum once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import SingularDiagonal
from decomp_kernels.kernels import gemm


def build(m: SingularDiagonal, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    compute = weight.dtype if m.right.dtype == weight.dtype else wide
    right, diagonal = m.right.to(compute), m.diagonal.to(wide)
    built = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(weight, gemm.OUTER_ELEMENTS):
        left = (m.left[rows] * diagonal).to(compute)
        built[rows] = torch.addmm(weight[rows].to(compute), left, right)
    return built


def contract(m: SingularDiagonal, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """By the tokens' coordinates, 2 M k (N + K) operations, or by dW, 2 N K (M + k)."""
    N, K = weight.shape
    M, k = x.shape[0], m.diagonal.shape[0]
    by_tokens = M * k * (N + K) <= N * K * (M + k)
    total = _from_tokens(m, g, x) if by_tokens else _from_weight(m, g, x)
    return total.to(m.diagonal.dtype)


def _from_tokens(m: SingularDiagonal, g: Tensor, x: Tensor) -> Tensor:
    total = _zeros(m, x)
    for rows in gemm.row_blocks(x, gemm.OUTER_ELEMENTS):
        u = gemm.project(g[rows], m.left).to(total.dtype)
        total += u.mul_(gemm.project(x[rows], m.right.T)).sum(0)
    return total


def _from_weight(m: SingularDiagonal, g: Tensor, x: Tensor) -> Tensor:
    total = _zeros(m, x)
    for rows, P in gemm.outer_blocks(g, x):
        turned = gemm.project(P, m.right.T).to(total.dtype)  # P V, [n, k]
        total += turned.mul_(m.left[rows]).sum(0)
    return total


def _zeros(m: SingularDiagonal, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(m.diagonal.shape, dtype=wide, device=x.device)
