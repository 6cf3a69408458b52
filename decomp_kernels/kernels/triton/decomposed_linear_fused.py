"""The decomposed linear in fused kernels (maths: reference/decomposed_linear.py).

Forward is the down projection and one kernel for all the rest; backward is one pass over dY, one
over x, and one kernel for d_x and d_in_scale.  No term of the size of y or of x is written but z,
where it is kept, and g = out_scale * dy, where the base weight or the addend is trained.
"""

from typing import Any

from torch import Tensor

from decomp_kernels.kernels import columns
from decomp_kernels.kernels.triton.decomposed_linear import small_gradients, weight_gradient
from decomp_kernels.kernels.triton.down_projection import down_projection
from decomp_kernels.kernels.triton.fused_forward import fused_forward
from decomp_kernels.kernels.triton.fused_input_gradient import fused_input_gradient
from decomp_kernels.reference.decomposed_linear import Gradients, activate


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
    t = v = None
    if down is not None and up is not None:
        t = down_projection(x, down, in_scale, seed, dropout)
        v = activate(t, activation)
        if core is not None:
            v, scale = (v * (core.float() * scale)).to(v.dtype), 1.0
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
    dt, found = small_gradients(
        dy, x, down, up, core, in_scale, out_scale, t, z, seed, scale, dropout, activation, need
    )  # fmt: skip
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
        weight=weight_gradient(g, x, in_scale) if need.weight else None,
        in_scale=d_in,
        addend=g if need.addend else None,
    )
