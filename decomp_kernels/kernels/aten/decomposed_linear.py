"""The decomposed linear as a composition of library calls (maths: reference/decomposed_linear.py).

Low-rank first, then the base GEMM with beta = 1 in place.  What is rank-r is done in the dtype of
``down``: float32 adapters on a bf16 or fp16 base keep float32 precision and x is never converted
as a whole.  No N x K tensor is made, and the gradient of a column scale is a sum, not a GEMM.
"""

from typing import Any

from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels import columns, composition, gemm
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
    x = composition.contiguous(x)
    first_bias = None if bias is None or out_scale is not None else bias.to(x.dtype)

    start, t = first_bias, None
    if addend is not None:
        addend = composition.contiguous(addend)  # y has the layout of what the base GEMM adds to
        start = addend if first_bias is None else addend + first_bias
    if down is not None and up is not None:
        t = composition.project_dropped(x, composition.scaled_down(down, in_scale), seed, dropout)
        v = composition.times(activate(t, activation), core, scale)
        start = gemm.expand(v, up.T, start, x.dtype)
    elif addend is not None and start is addend:
        start = addend.clone()

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
    dy = composition.contiguous(dy)
    x = None if x is None else composition.contiguous(x)
    need_dX = bool(need.x or need.in_scale)

    g, d_out, d_bias = composition.over_scale(
        dy, z, bias, out_scale, scaled=bool(need_dX or need.weight or need.addend), need=need
    )
    dt = d_X = d_down = d_up = d_core = None
    after = False  # whether the branch is added after the base GEMM
    if down is not None and up is not None:
        dt, d_up, d_core = composition.low_rank(
            dy, up, core, out_scale, t, scale, activation,
            needs=(bool(need_dX or need.down), bool(need.up), bool(need.core)),
        )  # fmt: skip
        if dt is not None:
            after = seed is None and dt.dtype == dy.dtype and dispatch.base_gemm_first(dy)
            d_X, d_down = composition.to_input(
                dt, x, down, in_scale, seed, dropout, dy.dtype, need_dX and not after,
                bool(need.down),
            )  # fmt: skip

    if need_dX:
        d_X = gemm.by_weight(g, weight, d_X)
        if after:
            gemm.accumulate(d_X, dt, down)  # type: ignore[arg-type]
    d_x, d_in = d_X, None
    if in_scale is not None and d_X is not None:
        d_x, d_in, _ = columns.scale_columns_backward(
            d_X, x, in_scale, scaled=bool(need.x), summed=bool(need.in_scale), shift=False
        )
    d_weight = composition.weight_gradient(g, x, in_scale) if need.weight else None
    d_addend = g if need.addend else None
    return Gradients(d_x, d_weight, d_bias, d_down, d_up, d_core, d_in, d_out, d_addend)
