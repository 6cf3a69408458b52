"""The decomposed linear in passes of the native library (maths: reference/decomposed_linear.py).

The base GEMM is the library's.  Ours is what reads a large tensor for rank-r work: the down
projection with dropout in registers; one pass over dY for dH, dB, dbias, d_out_scale and
out_scale * dY; one over x for dA with the mask again; the expansion that the base GEMM adds to.
"""

from typing import Any

from torch import Tensor

from decomp_kernels.kernels import composition, gemm
from decomp_kernels.kernels.native.passes import column_walk, down_projection, up_expansion
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
    dt, found, g = over_dy(
        column_walk, dy, up, core, out_scale, t, z, seed, scale, dropout, activation, need,
        scaled=bool(need_dX or need.weight or need.addend),
    )  # fmt: skip
    g = dy if g is None else g
    d_down = None
    if need.down and dt is not None and x is not None:
        x = x.contiguous()
        walked = column_walk(x, None, dt, None, None, False, seed=seed, dropout=dropout)
        d_down = walked.c.T  # type: ignore[union-attr]
        d_down = d_down if in_scale is None else d_down * in_scale
        d_down = d_down.contiguous()
    d_x = d_in = None
    if need_dX:
        if dt is not None and down is not None:
            d_x = up_expansion(dt, down, dy.dtype, seed=seed, dropout=dropout)
            d_x = gemm.accumulate(d_x, g, weight)
        else:
            d_x = g @ weight
        if in_scale is not None:
            summed = bool(need.in_scale)
            other = None if x is None or not summed else x.contiguous()
            walked = column_walk(d_x, None, None, other, in_scale if need.x else None, False)
            d_x, d_in = walked.scaled, walked.p
    return found._replace(
        x=d_x if need.x else None,
        weight=composition.weight_gradient(g, x, in_scale) if need.weight else None,
        down=d_down,
        in_scale=d_in,
        addend=g if need.addend else None,
    )
