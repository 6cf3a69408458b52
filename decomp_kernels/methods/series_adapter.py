"""Series adapter (Houlsby et al. 2019, arXiv:1902.00751): a bottleneck network behind the linear.

    z = x W^T + b        t = z A^T + a        y = z + s phi(t) B^T + c
    A = down [r, N], B = up [N, r], a = down_bias [r], c = up_bias [N]

A is uniform as nn.Linear's weight and the rest is zeros, so the start is exact; s = 1 by default.
On the output linear of a sub-layer this is Houlsby's adapter; with relu it is the bottleneck of
Pfeiffer et al. (arXiv:2005.00247), which sits behind the layer norm in their model.

Backward, with u = s dy B and dt = u * phi'(t):

    dz = dy + dt A    dA = dt^T z    dB = s dy^T phi(t)    da = sum_m dt    dc = sum_m dy

z and t are kept, and z is copied once, into y: the product with B accumulates onto the copy.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors
from decomp_kernels.kernels import gemm
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.parallel_adapter import check_curved
from decomp_kernels.ops.autocast import autocast_dtype
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.reference.decomposed_linear import activate, activation_derivative


@method("series_adapter")
class SeriesAdapter(Method):
    """r: width of the bottleneck.  scale: s.  activation: relu, silu, gelu or tanh."""

    formula = "z + s phi(z A^T + a) B^T + c,  z = x W^T + b"
    citation = "arXiv:1902.00751"
    trains = "2 r N + r + N"
    impls = ("auto", *dispatch.EVERYWHERE)

    r: int = 8
    scale: float = 1.0
    activation: str = "relu"

    def check_options(self) -> None:
        super().check_options()
        check_curved(self.activation)

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.out_features)
        adapter.up = base.matrix(base.out_features, self.r)
        adapter.down_bias = base.scales(self.r, fill=0.0)
        adapter.up_bias = base.scales(base.out_features, fill=0.0)

    def forward(self, adapter: Adapter, base: Base, x: Tensor, training: bool) -> Tensor:
        z = self.apply(Factors(), base, x)
        down, up = adapter.down, adapter.up
        if autocast_dtype(z) is not None:
            down, up = down.to(z.dtype), up.to(z.dtype)
        branch = bottleneck if dispatch.choose(z, self.impl) == "reference" else _Bottleneck.apply
        rows = z.reshape(-1, z.shape[-1])
        y = branch(rows, down, adapter.down_bias, up, adapter.up_bias, self.scale, self.activation)
        return y.view(z.shape)


def bottleneck(
    z: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    scale: float,
    activation: str,
) -> Tensor:
    """The definition of y [M, N] for z [M, N], in float32 or wider, rounded once."""
    wide = torch.promote_types(z.dtype, torch.float32)
    t = z.to(wide) @ down.to(wide).T + down_bias.to(wide)
    y = z.to(wide) + scale * (activate(t, activation) @ up.to(wide).T) + up_bias.to(wide)
    return y.to(z.dtype)


class _Bottleneck(torch.autograd.Function):
    """``bottleneck`` by library calls; the rank-r work is done in down's dtype."""

    @staticmethod
    def forward(ctx, z, down, down_bias, up, up_bias, scale, activation):
        t = gemm.project(z, down.T) + down_bias.to(down.dtype)
        phi = activate(t, activation)
        # c is one more column of B, whose coefficient is 1: no second pass over y.
        v = torch.cat((phi * scale, torch.ones_like(phi[:, :1])), 1)
        wide_up = torch.cat((up, up_bias.to(up.dtype)[:, None]), 1)
        ctx.scale, ctx.activation, ctx.bias_dtype = scale, activation, up_bias.dtype
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, t, down, up)
        return gemm.expand(v, wide_up.T, z, z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, t, down, up = ctx.saved_tensors
        need_z, need_down, need_down_bias, need_up, need_up_bias = ctx.needs_input_grad[:5]
        dy = dy.contiguous()
        d_z = d_down = d_down_bias = d_up = d_up_bias = None
        if need_z or need_down or need_down_bias:
            u = gemm.project(dy, up)
            dt = u * (activation_derivative(t, ctx.activation) * ctx.scale)
            d_z = gemm.expand(dt, down, dy, dy.dtype) if need_z else None
            d_down = _transposed(dt, z) if need_down else None
            d_down_bias = dt.sum(0, dtype=ctx.bias_dtype) if need_down_bias else None
        if need_up:
            phi = activate(t, ctx.activation) * ctx.scale
            d_up = _transposed(phi, dy).T.contiguous()
        if need_up_bias:
            d_up_bias = dy.sum(0, dtype=ctx.bias_dtype)
        return d_z, d_down, d_down_bias, d_up, d_up_bias, None, None


def _transposed(small: Tensor, big: Tensor) -> Tensor:
    """small [M, r]^T @ big [M, N] in small's dtype, which may be wider than big's."""
    if small.dtype == big.dtype:
        return small.T @ big
    out = small.new_zeros(small.shape[1], big.shape[1])
    for rows in gemm.row_blocks(big):
        out.addmm_(small[rows].T, big[rows].to(small.dtype))
    return out
