"""The decomposed linear in passes of the native library (maths: reference/decomposed_linear.py).

The base GEMM is the library's.  Ours is what reads a large tensor for rank-r work: the down
projection with dropout in registers; one pass over dY for dH, dB, dbias, d_out_scale and
out_scale * dY; one over x for dA with the mask again; the expansion that the base GEMM adds to,
where it is masked or of float32 operands.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels import composition, gemm
from decomp_kernels.kernels.native.passes import (
    column_walk,
    down_projection,
    rank_walk,
    up_expansion,
)
from decomp_kernels.kernels.over_dy import over_dy
from decomp_kernels.reference.decomposed_linear import Gradients


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
    x = x.contiguous()
    first_bias = None if out_scale is not None else bias
    t = None
    if down is not None and up is not None:
        small = composition.scaled_down(down, in_scale)
        t, v = down_projection(x, small, core, seed, scale, dropout, activation)
        start: Tensor | None
        if v.dtype == x.dtype and addend is None:
            start = gemm.expand(v, up.T, _to(first_bias, x.dtype), x.dtype)
        else:
            start = up_expansion(v, up.T, x.dtype, bias=first_bias, addend=addend)
    elif addend is not None:
        addend = composition.contiguous(addend)
        start = addend.clone() if first_bias is None else addend + first_bias.to(x.dtype)
    else:
        start = _to(first_bias, x.dtype)
    y, z = composition.base(x, weight, start, in_scale, out_scale, bias)
    return y, t, z if keep_z else None


def backward_by(
    input_gradient: Callable[..., tuple[Tensor | None, Tensor | None]],
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
    """The backward of both native forms, whose ways to (d_x, d_in_scale) differ.

    input_gradient(g, weight, dt, down, seed, dropout, in_scale, x, need_x): x [M, K] where
    d_in_scale is wanted, dt [M, r] and down [r, K] where there is a branch, else None.
    """
    need: Any = Gradients(*needs)
    dy = dy.contiguous()
    need_dX = bool(need.x or need.in_scale)
    dt, found, g = over_dy(
        column_walk, dy, up, core, out_scale, t, z, seed, scale, dropout, activation, need,
        scaled=bool(need_dX or need.weight or need.addend),
    )  # fmt: skip
    g = dy if g is None else g
    x = None if x is None else x.contiguous()
    d_down = d_x = d_in = None
    if need.down and dt is not None and x is not None:
        d_down = _d_down(x, dt, in_scale, seed, dropout)
    if need_dX:
        d_x, d_in = input_gradient(
            g, weight, dt, None if dt is None else down, seed, dropout, in_scale,
            x if need.in_scale else None, bool(need.x),
        )  # fmt: skip
    return found._replace(
        x=d_x,
        weight=composition.weight_gradient(g, x, in_scale) if need.weight else None,
        down=d_down,
        in_scale=d_in,
        addend=g if need.addend else None,
    )


def _input_gradient(
    g: Tensor,
    weight: Tensor,
    dt: Tensor | None,
    down: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    in_scale: Tensor | None,
    x: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """By the library's GEMM, on top of what the branch adds."""
    if dt is None or down is None:
        d_X = gemm.by_weight(g, weight, None)
    elif dt.dtype == g.dtype and seed is None:  # nothing to mask or to widen: library calls
        if dispatch.base_gemm_first(g):
            d_X = gemm.accumulate(gemm.by_weight(g, weight, None), dt, down)
        else:
            d_X = gemm.by_weight(g, weight, dt @ down)
    else:
        d_X = up_expansion(dt, down, g.dtype, seed=seed, dropout=dropout)
        d_X = gemm.by_weight(g, weight, d_X)
    if in_scale is None:
        return d_X if need_x else None, None
    walked = column_walk(d_X, None, None, x, in_scale if need_x else None, False)
    return walked.scaled, walked.p


backward = partial(backward_by, _input_gradient)


def _d_down(
    x: Tensor, dt: Tensor, in_scale: Tensor | None, seed: Tensor | None, dropout: float
) -> Tensor:
    """dA = dt^T drop(x) [r, K], times in_scale; dt is divided by the kept fraction."""
    if seed is None and dt.dtype == x.dtype and dispatch.plain_products_by_library(x):
        d_down = dt.T @ x
    else:
        d_down = rank_walk(x, dt, seed, dropout)
    return d_down if in_scale is None else d_down * in_scale


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
