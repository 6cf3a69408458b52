"""What one pass over dy gives a backward, and the rank-r work on it.

Maths: reference/decomposed_linear.py.  The same for one layer and for several of one x, with the
base GEMM the library's or fused, and for every family of kernels: the pass itself is an argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from decomp_kernels.reference.decomposed_linear import (
    Gradients,
    activate,
    activation_derivative,
)
from decomp_kernels.reference.dropout import kept_fraction


class Walked(NamedTuple):
    """What a pass over dy [M, N] gives, each None where it is not asked for."""

    u: Tensor | None  # [M, r] dy right, float32
    c: Tensor | None  # [N, r] dy^T left, float32
    p: Tensor | None  # [N] sum_m dy * other, float32
    s: Tensor | None  # [N] sum_m dy, float32
    scaled: Tensor | None = None  # [M, N] dy * scale


def over_dy(
    walk: Callable[..., Walked],
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
    scaled: bool = False,
) -> tuple[Tensor | None, Gradients, Tensor | None]:
    """dt, the gradients of bias, up, core and out_scale, and out_scale * dy where ``scaled``.

    walk(dy, right, left, other, scale, column_sum).  dt [M, r] in up's dtype is divided by the kept
    fraction, and None without a branch or where nothing needs it.  dy [M, N] is contiguous.
    """
    phi = right = left = None
    if up is not None:
        if t is not None and (need.up or need.core):
            phi = activate(t, activation).float()
        if need.x or need.in_scale or need.down or need.core:
            right = up if out_scale is None else (up * out_scale[:, None]).to(up.dtype)
        if need.up and phi is not None:
            left = (phi if core is None else phi * core.float()).mul(scale).to(up.dtype)
    walked = Walked(None, None, None, None)
    scaled = scaled and out_scale is not None
    if right is not None or left is not None or need.bias or need.out_scale or scaled:
        walked = walk(
            dy, right, left, z if need.out_scale else None, out_scale if scaled else None,
            bool(need.bias),
        )  # fmt: skip
    d_up = walked.c
    if d_up is not None and out_scale is not None:
        d_up = d_up * out_scale[:, None]
    dt = d_core = None
    if walked.u is not None and up is not None:
        u = walked.u * scale
        d_core = (u * phi).sum(0) if need.core and phi is not None else None
        dt = u if core is None else u * core.float()
        if activation != "identity" and t is not None:
            dt = dt * activation_derivative(t.float(), activation)
        dropping = dropout > 0.0 and seed is not None
        dt = (dt * (1.0 / kept_fraction(dropout) if dropping else 1.0)).to(up.dtype)
    found = Gradients(None, None, walked.s, None, d_up, d_core, None, walked.p, None)
    return dt, found, walked.scaled
