"""y = W U for a frozen W [N, K] and a small U [K, r], with W itself all that is kept.

    dU = W^T dy        y [N, r]

U may be float32 on a bf16 or fp16 W: the products keep float32 precision, and W is converted in
row blocks that stay in cache, where autograd through ``W.float() @ U`` would keep that copy.  A
quantised W is dequantised in U's dtype, tile by tile.
"""

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.ops.tiled_weight import TiledWeight, check_quantized
from decomp_kernels.quantized_weight import QuantizedWeight, absmax, dense_shape, scale_of

_WEIGHT = "Tensor weight, Tensor? weight_scale, str weight_format"

torch.library.define("decomp_kernels::frozen_matmul_fwd", f"({_WEIGHT}, Tensor right) -> Tensor")
torch.library.define("decomp_kernels::frozen_matmul_bwd", f"({_WEIGHT}, Tensor dy) -> Tensor")


@torch.library.impl("decomp_kernels::frozen_matmul_fwd", "CompositeExplicitAutograd")
@outside_autocast
def _fwd(weight, weight_scale, weight_format, right):
    if weight_scale is None:
        return gemm.project(weight, right)
    out = right.new_empty(weight.shape[0], right.shape[1])
    tiled = TiledWeight(weight, weight_scale, weight_format, "auto")
    tiled.each_row_tile(right.dtype, lambda rows, W: torch.mm(W, right, out=out[rows]))
    return out


@torch.library.impl("decomp_kernels::frozen_matmul_bwd", "CompositeExplicitAutograd")
@outside_autocast
def _bwd(weight, weight_scale, weight_format, dy):
    if weight_scale is not None:
        tiled = TiledWeight(weight, weight_scale, weight_format, "auto")
        out = dy.new_empty(tiled.shape[1], dy.shape[1])
        tiled.each_column_tile(dy.dtype, lambda cols, W: torch.mm(W.T, dy, out=out[cols]))
        return out
    if weight.dtype == dy.dtype:
        return weight.T @ dy
    d_right = dy.new_zeros(weight.shape[1], dy.shape[1])
    for rows in gemm.row_blocks(weight):
        d_right.addmm_(weight[rows].to(dy.dtype).T, dy[rows])
    return d_right


@torch.library.register_fake("decomp_kernels::frozen_matmul_fwd")
def _fwd_fake(weight, weight_scale, weight_format, right):
    return right.new_empty(weight.shape[0], right.shape[1])


@torch.library.register_fake("decomp_kernels::frozen_matmul_bwd")
def _bwd_fake(weight, weight_scale, weight_format, dy):
    K = weight.shape[1] if weight_scale is None else dense_shape(weight, weight_format)[1]
    return dy.new_empty(K, dy.shape[1])


fwd = torch.ops.decomp_kernels.frozen_matmul_fwd.default
bwd = torch.ops.decomp_kernels.frozen_matmul_bwd.default


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):  # not one by one: see ops/traced.py
        weight_format, right, weight, *scales = given
        ctx.save_for_backward(weight, *scales)
        ctx.weight_format = weight_format
        return fwd(weight, _absmax(scales), weight_format, right)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, *scales = ctx.saved_tensors
        d_right = bwd(weight, _absmax(scales), ctx.weight_format, dy)
        return None, d_right, None, *(None for _ in scales)


def _absmax(scales):
    return absmax(scale_of(scales)) if scales else None


def frozen_matmul(weight: Tensor | QuantizedWeight, right: Tensor) -> Tensor:
    """``weight @ right``, [N, r] in right's dtype: the weight's or float32, of codes any.

    The gradient is right's; a weight that requires grad gets its own by plain autograd.
    """
    if weight.dim() != 2 or right.dim() != 2 or weight.shape[1] != right.shape[0]:
        raise ValueError(
            f"right must be [K, r] for a weight [N, K], got {tuple(right.shape)} for "
            f"{tuple(weight.shape)}"
        )
    if isinstance(weight, QuantizedWeight):  # has tiles of any dtype
        check_quantized(weight)
        return _FrozenMatmul.apply(weight.format, right, *weight.tensors())
    if right.dtype not in (weight.dtype, torch.promote_types(weight.dtype, torch.float32)):
        raise TypeError(f"right must be {weight.dtype} or float32, got {right.dtype}")
    if weight.requires_grad:
        return weight.to(right.dtype) @ right
    return _FrozenMatmul.apply("dense", right, weight)
