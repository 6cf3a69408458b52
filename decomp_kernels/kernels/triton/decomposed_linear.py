"""The decomposed linear in passes (maths: reference/decomposed_linear.py).

The base GEMM is the library's; Triton does what is bound by memory: the down projection, with
dropout and in_scale in registers; the expansion that the base GEMM adds to, which holds the bias
and the addend, or in backward the mask; one pass over dY for dH, dB, dbias and d_out_scale; one
pass over x for dA, d_in_scale and in_scale * dX.  Each large tensor is read once, where library
calls read it for each result.
"""

from typing import Any

from torch import Tensor

from decomp_kernels.kernels import columns, composition, gemm
from decomp_kernels.kernels.triton.column_walk import Left, walk_columns
from decomp_kernels.kernels.triton.down_projection import Adapter, down_projections
from decomp_kernels.kernels.triton.over_dy import over_dy
from decomp_kernels.kernels.triton.up_expansion import up_expansion
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
        adapter = Adapter(down, in_scale, seed, dropout, core, scale, activation)
        ((t, v),) = down_projections(x, [adapter])
        start: Tensor | None = up_expansion(v, up.T, x.dtype, bias=first_bias, addend=addend)
    elif addend is not None:
        addend = composition.contiguous(addend)
        start = addend.clone() if first_bias is None else addend + first_bias.to(x.dtype)
    else:
        start = None if first_bias is None else first_bias.to(x.dtype)
    y, z = composition.base(x, weight, start, in_scale, out_scale, bias)
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
    dy = dy.contiguous()
    need_dX = bool(need.x or need.in_scale)
    dt, found, _ = over_dy(dy, up, core, out_scale, t, z, seed, scale, dropout, activation, need)
    need_g = bool(need_dX or need.weight or need.addend)
    g = dy if out_scale is None or not need_g else columns.scale_columns(dy, out_scale)
    d_x = d_in = None
    if need_dX:
        if dt is not None and down is not None:
            d_x = up_expansion(dt, down, dy.dtype, seed=seed, dropout=dropout)
            d_x = gemm.accumulate(d_x, g, weight)
        else:
            d_x = g @ weight
    lefts = [Left(dt, seed, dropout)] if need.down and dt is not None else []
    d_down = None
    if x is not None and (lefts or need.in_scale):  # dA, d_in_scale and d_x of one pass over x
        scaling = need_dX and in_scale is not None
        walked = walk_columns(
            x, lefts, other=d_x if scaling else None, scale=in_scale if scaling else None
        )
        if lefts:
            d_down = walked.c[0] if in_scale is None else walked.c[0] * in_scale
        if scaling:
            d_x, d_in = walked.scaled, walked.p
    elif d_x is not None and in_scale is not None:
        d_x = columns.scale_columns(d_x, in_scale)
    return found._replace(
        x=d_x if need.x else None,
        weight=composition.weight_gradient(g, x, in_scale) if need.weight else None,
        down=d_down,
        in_scale=d_in if need.in_scale else None,
        addend=g if need.addend else None,
    )
