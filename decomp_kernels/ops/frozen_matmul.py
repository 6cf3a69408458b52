"""y = W U for a frozen W [N, K] and a small U [K, r], with W itself all that is kept.

    dU = W^T dy        y [N, r]

U may be float32 on a bf16 or fp16 W: the products keep float32 precision, and W is converted in
row blocks that stay in cache, where autograd through ``W.float() @ U`` would keep that copy.
"""

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.once import once_differentiable

torch.library.define("decomp_kernels::frozen_matmul_fwd", "(Tensor weight, Tensor right) -> Tensor")
torch.library.define("decomp_kernels::frozen_matmul_bwd", "(Tensor weight, Tensor dy) -> Tensor")


@torch.library.impl("decomp_kernels::frozen_matmul_fwd", "CompositeExplicitAutograd")
@outside_autocast
def _fwd(weight, right):
    return gemm.project(weight, right)


@torch.library.impl("decomp_kernels::frozen_matmul_bwd", "CompositeExplicitAutograd")
@outside_autocast
def _bwd(weight, dy):
    if weight.dtype == dy.dtype:
        return weight.T @ dy
    d_right = dy.new_zeros(weight.shape[1], dy.shape[1])
    for rows in gemm.row_blocks(weight):
        d_right.addmm_(weight[rows].to(dy.dtype).T, dy[rows])
    return d_right


@torch.library.register_fake("decomp_kernels::frozen_matmul_fwd")
def _fwd_fake(weight, right):
    return right.new_empty(weight.shape[0], right.shape[1])


@torch.library.register_fake("decomp_kernels::frozen_matmul_bwd")
def _bwd_fake(weight, dy):
    return dy.new_empty(weight.shape[1], dy.shape[1])


fwd = torch.ops.decomp_kernels.frozen_matmul_fwd.default
bwd = torch.ops.decomp_kernels.frozen_matmul_bwd.default


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, right):
        ctx.save_for_backward(weight)
        return fwd(weight, right)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return None, bwd(weight, dy)


def frozen_matmul(weight: Tensor, right: Tensor) -> Tensor:
    """``weight @ right``, [N, r] in right's dtype, which is the weight's or float32.

    The gradient is right's; a weight that requires grad gets its own by plain autograd.
    """
    if weight.dim() != 2 or right.dim() != 2 or weight.shape[1] != right.shape[0]:
        raise ValueError(
            f"right must be [K, r] for a weight [N, K], got {tuple(right.shape)} for "
            f"{tuple(weight.shape)}"
        )
    if right.dtype not in (weight.dtype, torch.promote_types(weight.dtype, torch.float32)):
        raise TypeError(f"right must be {weight.dtype} or float32, got {right.dtype}")
    if weight.requires_grad:
        return weight.to(right.dtype) @ right
    return _FrozenMatmul.apply(weight, right)
