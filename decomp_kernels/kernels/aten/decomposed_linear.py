"""The decomposed linear as a composition of library calls (maths: reference/decomposed_linear.py).

Low-rank first, then the base GEMM with beta = 1 in place.  What is rank-r is done in the dtype of
``down``: float32 adapters on a bf16 or fp16 base keep float32 precision and x is never converted
as a whole.  No N x K tensor is made, and the gradient of a column scale is a sum, not a GEMM.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels import dispatch
from decomp_kernels.kernels import columns, gemm, mask
from decomp_kernels.reference.decomposed_linear import (
    Gradients,
    activate,
    activation_derivative,
)
from decomp_kernels.reference.dropout import kept_fraction


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    addend: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    activation: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [M, N], t [M, r] in down's dtype, z [M, N]: y before out_scale and bias."""
    x = _contiguous(x)
    first_bias = None if bias is None or out_scale is not None else bias.to(x.dtype)

    start, t = first_bias, None
    if addend is not None:
        start = addend if first_bias is None else addend + first_bias
    if down is not None and up is not None:
        t = _project_dropped(x, _scaled_down(down, in_scale), seed, dropout)
        v = _times(activate(t, activation), core, scale)
        start = gemm.expand(v, up.T, start, x.dtype)
    elif addend is not None and start is addend:
        start = addend.clone()

    X = x if in_scale is None else columns.scale_columns(x, in_scale)
    if start is None:
        z = F.linear(X, weight)
    elif start.dim() == 1:
        z = F.linear(X, weight, start)
    else:
        z = gemm.accumulate(start, X, weight.T)
    y = z if out_scale is None else columns.scale_columns(z, out_scale, bias)
    return y, t, z if keep_z else None


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    activation: str,
    needs: Gradients | tuple[bool, ...],
) -> Gradients:
    need: Any = Gradients(*needs)
    dy = _contiguous(dy)
    x = None if x is None else _contiguous(x)
    need_dX = bool(need.x or need.in_scale)

    g, d_out, d_bias = dy, None, None
    if out_scale is not None:
        scaled, d_out, d_bias = columns.scale_columns_backward(
            dy,
            z,
            out_scale,
            scaled=bool(need_dX or need.weight or need.addend),
            summed=bool(need.out_scale),
            shift=bool(need.bias),
        )
        g = dy if scaled is None else scaled
    elif need.bias:
        d_bias = dy.sum(0, dtype=None if bias is None else bias.dtype)

    dt = d_X = d_down = d_up = d_core = None
    after = False  # whether the branch is added after the base GEMM
    if down is not None and up is not None:
        dt, d_up, d_core = _low_rank(
            dy, up, core, out_scale, t, scale, activation,
            needs=(bool(need_dX or need.down), bool(need.up), bool(need.core)),
        )  # fmt: skip
        if dt is not None:
            after = seed is None and dt.dtype == dy.dtype and dispatch.base_gemm_first(dy)
            d_X, d_down = _to_input(
                dt, x, down, in_scale, seed, dropout, dy.dtype, need_dX and not after,
                bool(need.down),
            )  # fmt: skip

    if need_dX:
        d_X = g @ weight if d_X is None else gemm.accumulate(d_X, g, weight)
        if after:
            gemm.accumulate(d_X, dt, down)  # type: ignore[arg-type]
    d_x, d_in = d_X, None
    if in_scale is not None and d_X is not None:
        d_x, d_in, _ = columns.scale_columns_backward(
            d_X, x, in_scale, scaled=bool(need.x), summed=bool(need.in_scale), shift=False
        )
    d_weight = None
    if need.weight and x is not None:
        d_weight = g.T @ (x if in_scale is None else columns.scale_columns(x, in_scale))
    d_addend = g if need.addend else None
    return Gradients(d_x, d_weight, d_bias, d_down, d_up, d_core, d_in, d_out, d_addend)


def _low_rank(
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
    v = _times(phi, core, scale) if need_up and phi is not None else None
    small = None
    if need_dt or need_core:
        small = up if out_scale is None else (up * out_scale[:, None]).to(up.dtype)
    u, d_up = _over_rows(dy, small, v)
    if d_up is not None:
        d_up = d_up if out_scale is None else (d_up * out_scale).to(up.dtype)
        d_up = d_up.T.contiguous()
    if u is None:
        return None, d_up, None
    d_core = None
    if need_core and phi is not None:
        d_core = (u.to(_wide(u)) * phi.to(_wide(u))).sum(0).mul_(scale)
    dt = None
    if need_dt:
        dt = _times(u, core, scale)
        if activation != "identity" and t is not None:
            dt = dt * activation_derivative(t, activation)
    return dt, d_up, d_core


def _to_input(
    dt: Tensor,
    x: Tensor | None,
    down: Tensor,
    in_scale: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    dtype: torch.dtype,
    need_dX: bool,
    need_down: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The branch's part of d_X, a new [M, K] tensor, and d_down."""
    d_down = d_X = None
    if dropout == 0.0 or seed is None:
        if need_down and x is not None:
            _, d_down = _over_rows(x, None, dt)
        if need_dX:
            d_X = gemm.expand(dt, down, None, dtype)
    else:
        dt = dt * (1.0 / kept_fraction(dropout))
        M, K = dt.shape[0], down.shape[1]
        if need_down:
            d_down = torch.zeros(down.shape, dtype=_wide(down), device=down.device)
        if need_dX:
            d_X = torch.empty(M, K, dtype=dtype, device=dt.device)
        for rows in gemm.row_blocks(dt, mask.BLOCK_ELEMENTS, K):
            kept = mask.keep(seed, rows, K, dropout)
            if d_down is not None and x is not None:
                part: Any = _over_rows(mask.apply(x[rows], kept), None, dt[rows])[1]
                d_down.add_(part)
            if d_X is not None:
                mask.apply(gemm.expand(dt[rows], down, None, dtype), kept, out=d_X[rows])
    if d_down is not None:
        d_down = d_down if in_scale is None else d_down * in_scale
        d_down = d_down.to(down.dtype)
    return d_X, d_down


def _over_rows(
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


def _project_dropped(x: Tensor, down: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """t = drop(x) down^T, [M, r] in down's dtype."""
    if dropout == 0.0 or seed is None:
        return gemm.project(x, down.T)
    M, K = x.shape
    t = torch.empty(M, down.shape[0], dtype=down.dtype, device=x.device)
    for rows in gemm.row_blocks(x, mask.BLOCK_ELEMENTS):
        kept = mask.keep(seed, rows, K, dropout)
        t[rows] = gemm.project(mask.apply(x[rows], kept), down.T)
    return t.mul_(1.0 / kept_fraction(dropout))


def _scaled_down(down: Tensor, in_scale: Tensor | None) -> Tensor:
    """The scaled X exists for the base GEMM alone: the branch takes x and scales A instead."""
    return down if in_scale is None else (down * in_scale).to(down.dtype)


def _times(t: Tensor, core: Tensor | None, scale: float) -> Tensor:
    """t * core * scale with one rounding."""
    if core is not None:
        return (t * (core.to(_wide(t)) * scale)).to(t.dtype)
    return t if scale == 1.0 else t * scale


def _contiguous(t: Tensor) -> Tensor:
    """Expanded and column-major operands are slow in bf16 GEMMs."""
    return t if t.is_contiguous() else t.contiguous()


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
