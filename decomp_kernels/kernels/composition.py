"""The parts of a decomposed linear in library calls, for one layer and for several of one x.

Maths: reference/decomposed_linear.py.  What is rank-r is done in the dtype of ``down``, and a large
operand is never converted as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from decomp_kernels.kernels import columns, gemm, mask
from decomp_kernels.reference.decomposed_linear import activate, activation_derivative
from decomp_kernels.reference.dropout import kept_fraction


def base(
    x: Tensor,
    weight: Tensor,
    start: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, z): the base GEMM on top of ``start`` [N] or [M, N], which it may write to; out_scale.

    bias is for y, beside out_scale alone.
    """
    X = x if in_scale is None else columns.scale_columns(x, in_scale)
    z = gemm.by_weight_t(X, weight, start)
    y = z if out_scale is None else columns.scale_columns(z, out_scale, bias)
    return y, z


def over_scale(
    dy: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    out_scale: Tensor | None,
    scaled: bool,
    need: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(g, d_out_scale, d_bias).  g is dy where it is not ``scaled``."""
    if out_scale is None:
        if bias is None or not need.bias:
            return dy, None, None
        return dy, None, columns.column_sum(dy, bias.dtype)
    g, d_out, d_bias = columns.scale_columns_backward(
        dy, z, out_scale, scaled=scaled, summed=bool(need.out_scale), shift=bool(need.bias)
    )
    return dy if g is None else g, d_out, d_bias


def low_rank(
    dy: Tensor,
    up: Tensor,
    core: Tensor | None,
    out_scale: Tensor | None,
    t: Tensor | None,
    scale: float,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dt, d_up, d_core) from one walk over dy.

    out_scale multiplies the small operand, u = dy (s_o B) and dB = s_o (dy^T v), so that the
    rank-r work sees dy itself and not a rounded product.
    """
    need_dt, need_up, need_core = needs
    phi = None if t is None else activate(t, activation)
    v = times(phi, core, scale) if need_up and phi is not None else None
    small = None
    if need_dt or need_core:
        small = up if out_scale is None else (up * out_scale[:, None]).to(up.dtype)
    u, d_up = over_rows(dy, small, v)
    if d_up is not None:
        d_up = d_up if out_scale is None else (d_up * out_scale).to(up.dtype)
        d_up = d_up.T.contiguous()
    if u is None:
        return None, d_up, None
    d_core = None
    if need_core and phi is not None:
        d_core = (u.to(wide(u)) * phi.to(wide(u))).sum(0).mul_(scale)
    dt = None
    if need_dt:
        dt = times(u, core, scale)
        if activation != "identity" and t is not None:
            dt = dt * activation_derivative(t, activation)
    return dt, d_up, d_core


def to_input(
    dt: Tensor,
    x: Tensor | None,
    down: Tensor,
    in_scale: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    dtype: torch.dtype,
    need_dX: bool,
    need_down: bool,
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The branch's part of d_X, a new [M, K] tensor or added to ``into``, and d_down."""
    d_down = d_X = None
    if dropout == 0.0 or seed is None:
        if need_down and x is not None:
            _, d_down = over_rows(x, None, dt)
        if need_dX:
            d_X = gemm.expand(dt, down, into, dtype)
    else:
        dt = dt * (1.0 / kept_fraction(dropout))
        M, K = dt.shape[0], down.shape[1]
        if need_down:
            d_down = torch.zeros(down.shape, dtype=wide(down), device=down.device)
        if need_dX:
            d_X = torch.empty(M, K, dtype=dtype, device=dt.device) if into is None else into
        for rows in gemm.row_blocks(dt, mask.BLOCK_ELEMENTS, K):
            kept = mask.keep(seed, rows, K, dropout)
            if d_down is not None and x is not None:
                product: Any = over_rows(mask.apply(x[rows], kept), None, dt[rows])[1]
                d_down.add_(product)
            if d_X is not None:
                part = gemm.expand(dt[rows], down, None, dtype)
                if into is None:
                    mask.apply(part, kept, out=d_X[rows])
                else:
                    into[rows] += mask.apply(part, kept)
    if d_down is not None:
        d_down = d_down if in_scale is None else d_down * in_scale
        d_down = d_down.to(down.dtype)
    return d_X, d_down


def over_rows(
    big: Tensor, right: Tensor | None, left: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(big @ right, left^T @ big) for big [M, N], right [N, r], left [M, r].

    The small operands may be wider than ``big``; then both products come from one walk over it,
    block by block, and the second is summed in their dtype.
    """
    small = right if right is not None else left
    if small is None:
        return None, None
    if small.dtype == big.dtype:
        first = None if right is None else gemm.skinny(big, right)
        second = None if left is None else left.T @ big
        return first, second
    M, N = big.shape
    first = None if right is None else right.new_empty(M, right.shape[1])
    second = None if left is None else left.new_zeros(left.shape[1], N)
    for rows, block in gemm.converted(big, small.dtype):
        if first is not None and right is not None:
            torch.mm(block, right, out=first[rows])
        if second is not None and left is not None:
            second.addmm_(left[rows].T, block)
    return first, second


def project_dropped(x: Tensor, down: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """t = drop(x) down^T, [M, r] in down's dtype."""
    if dropout == 0.0 or seed is None:
        return gemm.project(x, down.T)
    M, K = x.shape
    t = torch.empty(M, down.shape[0], dtype=down.dtype, device=x.device)
    for rows in gemm.row_blocks(x, mask.BLOCK_ELEMENTS):
        kept = mask.keep(seed, rows, K, dropout)
        t[rows] = gemm.project(mask.apply(x[rows], kept), down.T)
    return t.mul_(1.0 / kept_fraction(dropout))


def weight_gradient(g: Tensor, x: Tensor | None, in_scale: Tensor | None) -> Tensor:
    """dW = g^T X: one more GEMM of the library, for a base weight that is trained."""
    if x is None:
        raise RuntimeError("the gradient of the weight was asked for without x")
    return g.T @ (x if in_scale is None else columns.scale_columns(x, in_scale))


def scaled_down(down: Tensor, in_scale: Tensor | None) -> Tensor:
    """The scaled X exists for the base GEMM alone: the branch takes x and scales A instead."""
    return down if in_scale is None else (down * in_scale).to(down.dtype)


def times(t: Tensor, core: Tensor | None, scale: float) -> Tensor:
    """t * core * scale with one rounding."""
    if core is not None:
        return (t * (core.to(wide(t)) * scale)).to(t.dtype)
    return t if scale == 1.0 else t * scale


def contiguous(t: Tensor) -> Tensor:
    """Expanded and column-major operands are slow in bf16 GEMMs."""
    return t if t.is_contiguous() else t.contiguous()


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
