"""The decomposed linear in passes (maths: reference/decomposed_linear.py).

The base GEMM is the library's; Triton does what is bound by memory: the down projection, with
dropout and in_scale in registers; the expansion that the base GEMM adds to, which holds the bias
and the addend, or in backward the mask; one pass over dY for dH, dB, dbias and d_out_scale; one
pass over x for dA.  Each large tensor is read once, where library calls read it for each result.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels.kernels import columns, gemm
from decomp_kernels.kernels.triton.column_walk import column_walk, partials_are_cheap
from decomp_kernels.kernels.triton.down_projection import down_projection
from decomp_kernels.kernels.triton.up_expansion import up_expansion
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
    x = x.contiguous()
    first_bias = None if out_scale is not None else bias
    t = None
    if down is not None and up is not None:
        t = down_projection(x, down, in_scale, seed, dropout)
        v = activate(t, activation)
        v = v * scale if core is None else (v * (core.float() * scale)).to(v.dtype)
        start: Tensor | None = up_expansion(v, up.T, x.dtype, bias=first_bias, addend=addend)
    elif addend is not None:
        start = addend.clone() if first_bias is None else addend + first_bias.to(x.dtype)
    else:
        start = None if first_bias is None else first_bias.to(x.dtype)
    X = x if in_scale is None else columns.scale_columns(x, in_scale)
    if start is None or start.dim() == 1:
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
    dy = dy.contiguous()
    need_dX = bool(need.x or need.in_scale)
    dt, found = small_gradients(
        dy, x, down, up, core, in_scale, out_scale, t, z, seed, scale, dropout, activation, need
    )  # fmt: skip
    need_g = bool(need_dX or need.weight or need.addend)
    g = dy if out_scale is None or not need_g else columns.scale_columns(dy, out_scale)
    d_x = d_in = None
    if need_dX:
        if dt is not None and down is not None:
            d_X = up_expansion(dt, down, dy.dtype, seed=seed, dropout=dropout)
            d_X = gemm.accumulate(d_X, g, weight)
        else:
            d_X = g @ weight
        d_x = d_X
        if in_scale is not None:
            d_x, d_in, _ = columns.scale_columns_backward(
                d_X, x, in_scale, scaled=bool(need.x), summed=bool(need.in_scale), shift=False
            )
    return found._replace(
        x=d_x,
        weight=weight_gradient(g, x, in_scale) if need.weight else None,
        in_scale=d_in,
        addend=g if need.addend else None,
    )


def small_gradients(
    dy: Tensor,
    x: Tensor | None,
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
    need: Any,
) -> tuple[Tensor | None, Gradients]:
    """dt, and the gradients of bias, down, up, core and out_scale: one pass over dy, one over x.

    dt [M, r] in down's dtype is divided by the kept fraction, and None without a branch or where
    nothing needs it.  dy is contiguous.
    """
    phi = right = left = None
    if down is not None and up is not None:
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

    dt = d_down = d_core = None
    if u is not None and down is not None:
        u = u * scale
        d_core = (u * phi).sum(0) if need.core and phi is not None else None
        dt = u if core is None else u * core.float()
        if activation != "identity" and t is not None:
            dt = dt * activation_derivative(t.float(), activation)
        dropping = dropout > 0.0 and seed is not None
        dt = (dt * (1.0 / kept_fraction(dropout) if dropping else 1.0)).to(down.dtype)
        if need.down and x is not None:
            d_down = column_walk(x.contiguous(), left=dt, seed=seed, dropout=dropout)[1]
            d_down = d_down if in_scale is None or d_down is None else d_down * in_scale
    return dt, Gradients(None, None, d_bias, d_down, d_up, d_core, None, d_out, None)


def weight_gradient(g: Tensor, x: Tensor | None, in_scale: Tensor | None) -> Tensor:
    """dW = g^T X: one more GEMM of the library, for a base weight that is trained."""
    if x is None:
        raise RuntimeError("the gradient of the weight was asked for without x")
    return g.T @ (x if in_scale is None else columns.scale_columns(x, in_scale))
