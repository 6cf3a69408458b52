"""W_eff = W R^T and its gradients in row blocks (maths: reference/block_rotate.py).

The blocks of one factor are one batched GEMM on [q, rows, b] views, float32 in cache.  Both walks
take rows, of W to build and of x and gx for the gradients, so nothing as large as either is made.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels import gemm


def build(m: BlockRotate, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = _Factors(m, wide)
    built = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(weight):
        turned = weight[rows].to(wide)
        for j in reversed(range(factors.count)):
            turned = factors.merge(torch.bmm(factors.split(turned, j), factors.blocks[j].mT), j)
        built[rows] = turned
    return built


def forward(m: BlockRotate, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = _Factors(m, wide)
    turned_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(x):
        turned = x[rows].to(wide)
        for j in range(factors.count):
            turned = factors.merge(torch.bmm(factors.split(turned, j), factors.blocks[j]), j)
        turned_x[rows] = turned
    return turned_x


def contract(m: BlockRotate, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    return backward(m, g @ weight, x)[0]


def backward(m: BlockRotate, gx: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = _Factors(m, wide)
    d_blocks = torch.zeros(m.blocks.shape, dtype=wide, device=x.device)
    dx = torch.empty_like(gx, memory_format=torch.contiguous_format)
    for rows in gemm.row_blocks(x):
        inputs = []  # x_{j-1} P_j in blocks
        turned = x[rows].to(wide)
        for j in range(factors.count):
            inputs.append(factors.split(turned, j))
            if j + 1 < factors.count:
                turned = factors.merge(torch.bmm(inputs[j], factors.blocks[j]), j)
        turned = gx[rows].to(wide)
        for j in reversed(range(factors.count)):
            taken = factors.split(turned, j)
            d_blocks[j].baddbmm_(inputs[j].mT, taken)
            turned = factors.merge(torch.bmm(taken, factors.blocks[j].mT), j)
        dx[rows] = turned
    return d_blocks.to(m.blocks.dtype), dx


class _Factors:
    """The factors of R, and rows [n, K] as the [q, n, b] operands of their batched GEMMs."""

    def __init__(self, m: BlockRotate, wide: torch.dtype) -> None:
        self.blocks = m.blocks.to(wide)  # [m, q, b, b]
        self.count, self.q, self.b, _ = m.blocks.shape
        self.orders = m.permutations
        self.returns = None if m.permutations is None else m.permutations.argsort(1)

    def split(self, rows: Tensor, j: int) -> Tensor:
        taken = rows if self.orders is None else rows.index_select(1, self.orders[j])
        return taken.reshape(-1, self.q, self.b).transpose(0, 1)

    def merge(self, blocks: Tensor, j: int) -> Tensor:
        rows = blocks.transpose(0, 1).reshape(-1, self.q * self.b)
        return rows if self.returns is None else rows.index_select(1, self.returns[j])
