"""The decomposed linear in fused kernels of the native library, on a GPU.

Maths: reference/decomposed_linear.py.  Forward is the down projection and one kernel for the rest;
backward is one pass over dY, one over x, and one kernel for d_x and d_in_scale.  The rank-r operand
pair runs through the main loop of that kernel, so that no term of the size of y or of x is written
but z, where it is kept, x * in_scale and out_scale * dy.

Float32 adapters keep float32 precision in t, dt, dA and dB; what enters the fused product (v and B,
dt and A) is rounded to x's dtype, as its result is.
"""

from functools import partial

from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.kernels import columns, composition
from decomp_kernels.kernels.native.decomposed_linear import backward_by
from decomp_kernels.kernels.native.passes import down_projection


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
    t = v = None
    if down is not None and up is not None:
        small = composition.scaled_down(down, in_scale)
        t, v = down_projection(x, small, core, seed, scale, dropout, activation)
    X = x if in_scale is None else columns.scale_columns(x, in_scale)
    y, z = fused_forward(
        X, weight, bias, v=v, up=up, out_scale=out_scale, addend=addend, keep_z=keep_z
    )
    return y, t, z


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    v: Tensor | None = None,
    up: Tensor | None = None,
    out_scale: Tensor | None = None,
    addend: Tensor | None = None,
    keep_z: bool = False,
    form: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y, z): z = x W^T + v B^T + addend, y = out_scale * z + bias, both in x's dtype.

    x [M, K], W [N, K], v [M, r], B [N, r] of one 16-bit dtype.  z where ``keep_z``.  form: "hopper"
    (warp-specialised, sm_90), "mma" (sm_80 and later), or "auto" for the first that can.
    """
    v, up = (None if t is None else t.to(x.dtype).contiguous() for t in (v, up))
    y, z = native_library.ops().fused_forward(
        x.contiguous(), weight.contiguous(), v, up, _float(bias), _float(out_scale),
        None if addend is None else addend.contiguous(), keep_z, form,
    )  # fmt: skip
    return y, z if keep_z else None


def fused_input_gradient(
    g: Tensor,
    weight: Tensor,
    dt: Tensor | None = None,
    down: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    in_scale: Tensor | None = None,
    x: Tensor | None = None,
    need_x: bool = True,
    form: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x where ``need_x``, d_in_scale [K] in float32 where x is given).

    dX = g W + mask(dt A), d_x = in_scale * dX, d_in_scale = sum_m x * dX.  g [M, N], W [N, K],
    dt [M, r], A [r, K] and x [M, K] of one 16-bit dtype; dt is divided by the kept fraction.
    """
    dt, down = (None if t is None else t.to(g.dtype).contiguous() for t in (dt, down))
    d_x, d_in = native_library.ops().fused_input_gradient(
        g.contiguous(), weight.contiguous(), dt, down, _float(in_scale),
        None if x is None else x.contiguous(), None if dt is None else seed, dropout, need_x, form,
    )  # fmt: skip
    return d_x if need_x else None, None if x is None else d_in


backward = partial(backward_by, fused_input_gradient)


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()
