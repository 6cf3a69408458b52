"""Dropout whose mask is made by a counter, in forward and again in backward: nothing is kept.

y = x * mask / kept fraction        the mask: reference/dropout.py
"""

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm, mask
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.reference.dropout import kept_fraction, threshold

torch.library.define(
    "decomp_kernels::counter_dropout", "(Tensor x, Tensor seed, float dropout) -> Tensor"
)


@torch.library.impl("decomp_kernels::counter_dropout", "CompositeExplicitAutograd")
def _dropout(x, seed, dropout):
    K = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    rows_x, rows_out = x.view(-1, K), out.view(-1, K)
    for rows in gemm.row_blocks(rows_x, mask.BLOCK_ELEMENTS):
        mask.apply(rows_x[rows], mask.keep(seed, rows, K, dropout), out=rows_out[rows])
    return out.mul_(1.0 / kept_fraction(dropout))


@torch.library.register_fake("decomp_kernels::counter_dropout")
def _dropout_fake(x, seed, dropout):
    return x.new_empty(x.shape)


class _CounterDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, dropout):
        ctx.save_for_backward(seed)
        ctx.dropout = dropout
        return torch.ops.decomp_kernels.counter_dropout.default(x, seed, dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return torch.ops.decomp_kernels.counter_dropout.default(dy, seed, ctx.dropout), None, None


def draw_seed(x: Tensor) -> Tensor:
    """A seed from torch's generator, on x's device, so that manual_seed and replays behave."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)


def counter_dropout(x: Tensor, dropout: float, seed: Tensor | None = None) -> Tensor:
    """x [..., K] with elements dropped with probability ``dropout`` and the others scaled up."""
    if threshold(dropout) == 0 or x.numel() == 0:
        return x
    return _CounterDropout.apply(x, draw_seed(x) if seed is None else seed, dropout)
