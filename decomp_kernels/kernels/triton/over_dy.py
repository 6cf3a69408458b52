"""What one pass over dy gives a backward, and the rank-r work on it.

Maths: reference/decomposed_linear.py.  The same for one layer and for several of one x, with the
base GEMM the library's or fused.
"""

from typing import Any

import torch
from torch import Tensor

from decomp_kernels.kernels.triton.column_walk import column_walk, partials_are_cheap
from decomp_kernels.kernels.triton.down_projection import down_projection
from decomp_kernels.reference.decomposed_linear import (
    Gradients,
    activate,
    activation_derivative,
)
from decomp_kernels.reference.dropout import kept_fraction


def over_dy(
    dy: Tensor,
    up: Tensor | None,
    core: Tensor | None,
    out_scale: Tensor | None,
    t: Tensor | None,
    z: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    activation: str,
    need: Any,
) -> tuple[Tensor | None, Gradients]:
    """dt, and the gradients of bias, up, core and out_scale.

    dt [M, r] in up's dtype is divided by the kept fraction, and None without a branch or where
    nothing needs it.  dy [M, N] is contiguous.
    """
    phi = right = left = None
    if up is not None:
        phi = None if t is None else activate(t, activation).float()
        if need.x or need.in_scale or need.down or need.core:
            right = up if out_scale is None else (up * out_scale[:, None]).to(up.dtype)
        if need.up and phi is not None:
            left = (phi if core is None else phi * core.float()).mul(scale).to(up.dtype)
    u = d_up = d_bias = d_out = None
    if right is not None and not partials_are_cheap(dy, right):
        u, right = down_projection(dy, right.T, dtype=torch.float32), None
    if right is not None or left is not None or need.bias or need.out_scale:
        walked, d_up, d_bias, d_out = column_walk(
            dy, right=right, left=left, other=z if need.out_scale else None,
            column_sum=bool(need.bias),
        )  # fmt: skip
        u = walked if u is None else u
    if d_up is not None:
        d_up = (d_up if out_scale is None else d_up * out_scale).T.contiguous()
    dt = d_core = None
    if u is not None and up is not None:
        u = u * scale
        d_core = (u * phi).sum(0) if need.core and phi is not None else None
        dt = u if core is None else u * core.float()
        if activation != "identity" and t is not None:
            dt = dt * activation_derivative(t.float(), activation)
        dropping = dropout > 0.0 and seed is not None
        dt = (dt * (1.0 / kept_fraction(dropout) if dropping else 1.0)).to(up.dtype)
    return dt, Gradients(None, None, d_bias, None, d_up, d_core, None, d_out, None)
