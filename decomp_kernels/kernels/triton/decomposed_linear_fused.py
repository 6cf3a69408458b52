"""The decomposed linear in fused kernels (maths: reference/decomposed_linear.py).

Forward is the down projection and one kernel for all the rest; of a few rows without dropout, one
kernel in all.  Backward is one pass over dY, one over x, and one kernel for d_x and d_in_scale.  No
term of the size of y or of x is written but z, where it is kept, and g = out_scale * dy, where the
base weight or the addend is trained.
"""

from typing import Any

from torch import Tensor

from decomp_kernels.kernels import columns, composition
from decomp_kernels.kernels.triton import decode
from decomp_kernels.kernels.triton.column_walk import column_walk
from decomp_kernels.kernels.triton.down_projection import Adapter, down_projections
from decomp_kernels.kernels.triton.fused_forward import fused_forward
from decomp_kernels.kernels.triton.fused_input_gradient import fused_input_gradient
from decomp_kernels.kernels.triton.over_dy import over_dy
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
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] <= decode.ROWS and (seed is None or dropout == 0.0):
        y, t, z = decode.decode(
            x, weight, bias, down, up, core, in_scale, out_scale, addend, scale, activation
        )
        return y, t, z if keep_z else None
    t = v = None
    if down is not None and up is not None:
        adapter = Adapter(down, in_scale, seed, dropout)
        if core is not None or activation != "identity":
            adapter, scale = adapter._replace(core=core, scale=scale, activation=activation), 1.0
        ((t, v),) = down_projections(x, [adapter])
    y, z = fused_forward(
        x, weight, bias, v=v, up=up, scale=scale, in_scale=in_scale, out_scale=out_scale,
        addend=addend, keep_z=keep_z,
    )  # fmt: skip
    return y, t, z


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
    dt, found, _ = over_dy(dy, up, core, out_scale, t, z, seed, scale, dropout, activation, need)
    d_down = None
    if need.down and dt is not None and x is not None:
        d_down = column_walk(x, left=dt, seed=seed, dropout=dropout)[1]
        d_down = d_down if in_scale is None or d_down is None else d_down * in_scale
    d_x = d_in = None
    if need.x or need.in_scale:
        d_x, d_in = fused_input_gradient(
            dy, weight, out_scale=out_scale, dt=dt, down=down, seed=seed, dropout=dropout,
            in_scale=in_scale, x=x if need.in_scale else None, need_x=bool(need.x),
        )  # fmt: skip
    g = dy
    if out_scale is not None and (need.weight or need.addend):
        g = columns.scale_columns(dy, out_scale)
    return found._replace(
        x=d_x,
        weight=composition.weight_gradient(g, x, in_scale) if need.weight else None,
        down=d_down,
        in_scale=d_in,
        addend=g if need.addend else None,
    )
