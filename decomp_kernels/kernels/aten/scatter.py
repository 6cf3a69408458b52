"""W_eff = W with values added at (rows, cols), and their gradients (maths: reference/scatter.py).

The gradient of few values is a dot product of two columns each, of many a gather from dW = g^T x
one block of rows at a time.  No step waits for the device to learn where the values are.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Scatter
from decomp_kernels.kernels import gemm

# Below one value in this many the dot products are faster.  2048 x 2048, 512 tokens, one thread of
# an AVX-512 CPU: float32 crosses at 1 in 80, bf16 at 1 in 130.
_SPARSE = 128


def build(m: Scatter, weight: Tensor) -> Tensor:
    changed = (weight[m.rows, m.cols] + m.values).to(weight.dtype)
    built = weight.clone(memory_format=torch.contiguous_format)
    return built.index_put_((m.rows, m.cols), changed)


def contract(m: Scatter, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    few = m.values.numel() * _SPARSE <= weight.numel()
    total = _by_dot_products(m, g, x) if few else _by_blocks(m, g, x)
    return total.to(m.values.dtype)


def _by_dot_products(m: Scatter, g: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    g, x = g.T.contiguous(), x.T.contiguous()  # what one value needs lies side by side
    total = torch.empty(m.values.shape, dtype=wide, device=x.device)
    for some in gemm.row_blocks(total, cols=x.shape[1]):
        products = g[m.rows[some]].to(wide).mul_(x[m.cols[some]])
        torch.sum(products, 1, out=total[some])
    return total


def _by_blocks(m: Scatter, g: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(m.values.shape, dtype=wide, device=x.device)
    K = x.shape[1]
    places = m.rows * K + m.cols
    for rows, P in gemm.outer_blocks(g, x):
        place = places - rows.start * K
        inside = (place >= 0) & (place < P.numel())
        found = P.flatten()[place.clamp_(0, P.numel() - 1)].to(wide)
        total = torch.where(inside, found, total)
    return total
