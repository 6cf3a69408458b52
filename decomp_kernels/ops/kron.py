"""y = x (left kron right)^T as an operator: schema, fakes, dispatch, autograd.

Formula and gradients: reference/kron.py.  The product is never formed, and x alone is kept.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels.aten import kron as aten
from decomp_kernels.ops.autocast import autocast_dtype
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.reference import kron as reference

torch.library.define(
    "decomp_kernels::kron_linear_fwd",
    "(Tensor x, Tensor left, Tensor right, str impl) -> Tensor",
)
torch.library.define(
    "decomp_kernels::kron_linear_bwd",
    "(Tensor dy, Tensor? x, Tensor left, Tensor right, bool[] needs, str impl)"
    " -> (Tensor dx, Tensor d_left, Tensor d_right)",
)


@torch.library.impl("decomp_kernels::kron_linear_fwd", "CompositeExplicitAutograd")
def _fwd(x, left, right, impl):
    y = _implementation(x, impl).forward(x.reshape(-1, x.shape[-1]), left, right)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


@torch.library.impl("decomp_kernels::kron_linear_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, left, right, needs, impl):
    dx, d_left, d_right = _implementation(dy, impl).backward(
        dy.reshape(-1, dy.shape[-1]),
        None if x is None else x.reshape(-1, x.shape[-1]),
        left, right, needs,
    )  # fmt: skip
    if dx is not None:
        dx = torch.ops.aten._unsafe_view(dx, (*dy.shape[:-1], dx.shape[-1]))
    return tuple(dy.new_empty(0) if t is None else t.contiguous() for t in (dx, d_left, d_right))


@torch.library.register_fake("decomp_kernels::kron_linear_fwd")
def _fwd_fake(x, left, right, impl):
    return x.new_empty((*x.shape[:-1], left.shape[0] * right.shape[0]))


@torch.library.register_fake("decomp_kernels::kron_linear_bwd")
def _bwd_fake(dy, x, left, right, needs, impl):
    need_x, need_left, need_right = needs
    absent = dy.new_empty(0)
    K = left.shape[1] * right.shape[1]
    return (
        dy.new_empty((*dy.shape[:-1], K)) if need_x else absent,
        left.new_empty(left.shape) if need_left else torch.empty_like(absent),
        right.new_empty(right.shape) if need_right else torch.empty_like(absent),
    )


def _implementation(x: Tensor, impl: str):
    return reference if dispatch.choose(x, impl) == "reference" else aten


fwd = torch.ops.decomp_kernels.kron_linear_fwd.default
bwd = torch.ops.decomp_kernels.kron_linear_bwd.default


class _KronLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, right, compute, impl):
        keep_x = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if keep_x else None, left, right)
        ctx.x_dtype, ctx.compute, ctx.impl = x.dtype, compute, impl
        return fwd(_to(x, compute), _to(left, compute), _to(right, compute), impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, left, right = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        C, D = _to(left, ctx.compute), _to(right, ctx.compute)
        grads = bwd(dy, _to(x, ctx.compute), C, D, needs, ctx.impl)
        dtypes = (ctx.x_dtype, left.dtype, right.dtype)
        shown = (
            grad.to(dtype) if need else None
            for grad, dtype, need in zip(grads, dtypes, needs, strict=True)
        )
        return *shown, None, None


def kron_linear(x: Tensor, left: Tensor, right: Tensor, *, impl: str = "auto") -> Tensor:
    """``x (left kron right)^T`` without the Kronecker product.

    x [..., b d], left [a, b], right [c, d]; returns [..., a c] in x's dtype, or in autocast's.
    The factors have x's dtype or float32, and the work keeps the precision of theirs.  Gradients
    of all three by hand-written formulas, x being kept for those of the factors alone.
    """
    dispatch.check(impl)
    for name, factor in (("left", left), ("right", right)):
        if factor.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(factor.shape)}")
        if factor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {factor.device}")
    K = left.shape[1] * right.shape[1]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(
            f"x must end in {left.shape[1]} * {right.shape[1]} = {K} columns, one for each column "
            f"of left kron right, got shape {tuple(x.shape)}"
        )
    allowed = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    compute = autocast_dtype(x)
    if compute is None and (left.dtype not in allowed or right.dtype not in allowed):
        raise TypeError(
            f"left and right must be {x.dtype} as x is, or float32, got {left.dtype} and "
            f"{right.dtype}"
        )
    return _KronLinear.apply(x, left, right, compute, impl)


def _to(t: Tensor | None, dtype: torch.dtype | None):
    return t if t is None or dtype is None else t.to(dtype)
