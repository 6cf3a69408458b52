"""Penalties on Gram matrices as an operator: schema, fakes, dispatch, autograd.

Formula and gradients: reference/gram.py.  One call takes the factors of a whole model.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels.aten import gram as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.reference import gram as reference
from decomp_kernels.reference.gram import KINDS, groups, wide

_FILES = files(triton="gram", native="gram")

torch.library.define(
    "decomp_kernels::gram_fwd",
    "(Tensor[] downs, Tensor[] ups, str kind, bool squared, float scale, str impl)"
    " -> (Tensor loss, Tensor[] residuals)",
)
torch.library.define(
    "decomp_kernels::gram_bwd",
    "(Tensor d_loss, Tensor[] downs, Tensor[] ups, Tensor[] residuals, bool squared, float scale,"
    " str impl) -> Tensor[]",
)


@torch.library.impl("decomp_kernels::gram_fwd", "CompositeExplicitAutograd")
@outside_autocast
def _fwd(downs, ups, kind, squared, scale, impl):
    chosen = _implementation("forward", downs, ups, impl)
    loss, residuals = chosen.forward(downs, ups, kind, squared, scale)
    return loss.to(_loss_dtype(downs, ups)), residuals


@torch.library.impl("decomp_kernels::gram_bwd", "CompositeExplicitAutograd")
@outside_autocast
def _bwd(d_loss, downs, ups, residuals, squared, scale, impl):
    chosen = _implementation("backward", downs, ups, impl)
    return chosen.backward(d_loss, downs, ups, residuals, squared, scale)


@torch.library.register_fake("decomp_kernels::gram_fwd")
def _fwd_fake(downs, ups, kind, squared, scale, impl):
    residuals = []
    for matrices, rank_axis in ((downs, 0), (ups, 1)):
        for group in groups(matrices):
            first = matrices[group[0]]
            r = first.shape[rank_axis]
            residuals.append(first.new_empty((len(group), r, r), dtype=wide(first.dtype)))
    return downs[0].new_empty((), dtype=_loss_dtype(downs, ups)), residuals


@torch.library.register_fake("decomp_kernels::gram_bwd")
def _bwd_fake(d_loss, downs, ups, residuals, squared, scale, impl):
    return [
        matrices[group[0]].new_empty((len(group), *matrices[group[0]].shape))
        for matrices in (downs, ups)
        for group in groups(matrices)
    ]


def _implementation(direction: str, downs: Sequence[Tensor], ups: Sequence[Tensor], impl: str):
    """By the matrix that the fewest implementations take: float64, then float16, then any."""
    matrices, first = (*downs, *ups), downs[0]
    hardest = max(matrices, key=lambda m: (m.dtype == torch.float64, m.dtype == torch.float16))

    def asked() -> dispatch.Work:
        base, adapter = dispatch.dtype_names(first, first)
        return dispatch.Work(
            "gram", direction, len(matrices), first.numel(), first.shape[0], base, adapter
        )

    return implementation(hardest, impl, reference, aten, _FILES, asked)


def _loss_dtype(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {m.dtype for m in (*downs, *ups)}, torch.float32)


fwd = torch.ops.decomp_kernels.gram_fwd.default
bwd = torch.ops.decomp_kernels.gram_bwd.default


class _GramPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):  # not one by one: see ops/traced.py
        kind, squared, scale, impl, down_count, *matrices = given
        downs, ups = matrices[:down_count], matrices[down_count:]
        loss, residuals = fwd(downs, ups, kind, squared, scale, impl)
        ctx.save_for_backward(*matrices, *residuals)
        ctx.squared, ctx.scale, ctx.impl = squared, scale, impl
        ctx.down_count, ctx.count = down_count, len(matrices)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor a single time
        matrices, residuals = saved[: ctx.count], saved[ctx.count :]
        downs, ups = matrices[: ctx.down_count], matrices[ctx.down_count :]
        stacked = bwd(d_loss, downs, ups, residuals, ctx.squared, ctx.scale, ctx.impl)
        positions = [*groups(downs), *([i + ctx.down_count for i in g] for g in groups(ups))]
        grads: list[Tensor | None] = [None] * ctx.count
        for group, stack in zip(positions, stacked, strict=True):
            for position, grad in zip(group, stack.unbind(), strict=True):
                grads[position] = grad if ctx.needs_input_grad[5 + position] else None
        return None, None, None, None, None, *grads


def gram_penalty(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    kind: str = "o",
    *,
    squared: bool = True,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """``scale * sum p(E)`` over all A = down [r, K] and B = up [N, r], a scalar.

    E = A A^T - I, and for B either B^T B - I (kind "o") or its off-diagonal part (kind "d");
    p is ||E||_F^2, or ||E||_F where not ``squared``.  arXiv 2407.05417, eq. 25 and 26.

    Shapes, dtypes and devices may differ from matrix to matrix.  Sums are float32, or float64 for
    float64 matrices; the scalar is on the first one's device.  Raises ValueError or TypeError
    before any work where the arguments do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    dispatch.check(impl)
    if not downs or not ups:
        raise ValueError("gram_penalty needs at least one down and one up, got an empty list")
    for name, matrices in (("downs", downs), ("ups", ups)):
        for matrix in matrices:
            if matrix.dim() != 2:
                raise ValueError(f"{name} must be matrices, got shape {tuple(matrix.shape)}")
            if not matrix.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {matrix.dtype}")
    return _GramPenalty.apply(kind, squared, float(scale), impl, len(downs), *downs, *ups)
