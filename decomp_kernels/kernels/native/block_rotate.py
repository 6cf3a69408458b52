"""W_eff = W R^T and its gradients by the native library (maths: reference/block_rotate.py).

For one factor that takes the columns in order.  Blocks and their gradient are float32.
"""

import torch
from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.factors import BlockRotate


def build(m: BlockRotate, weight: Tensor) -> Tensor:
    return native_library.ops().block_rotate(weight.contiguous(), _blocks(m).mT.contiguous())


def forward(m: BlockRotate, x: Tensor) -> Tensor:
    return native_library.ops().block_rotate(x.contiguous(), _blocks(m))


def contract(m: BlockRotate, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    return backward(m, g @ weight, x)[0]


def backward(m: BlockRotate, gx: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ops = native_library.ops()
    d_blocks, dx = ops.block_rotate_bwd(gx.contiguous(), x.contiguous(), _blocks(m))
    return d_blocks.unsqueeze(0).to(m.blocks.dtype), dx


def _blocks(m: BlockRotate) -> Tensor:
    return m.blocks[0].to(torch.float32).contiguous()
