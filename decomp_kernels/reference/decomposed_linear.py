"""The decomposed linear, the definition.

    X = x * in_scale        t = drop(X) A^T        v = phi(t) * core
    z = X W^T + scale * v B^T + addend             y = out_scale * z + bias

    x [M, K]  W [N, K]  A [r, K]  B [N, r]  core [r]  in_scale [K]  out_scale, bias [N]
    addend, z, y [M, N]

Backward, with g = out_scale * dy, u = scale * g B and dt = (u * core) * phi'(t):

    dX = g W + undrop(dt A)         dx = in_scale * dX        d_in_scale = sum_m x * dX
    dA = dt^T drop(X)               dB = scale * g^T v        d_core = sum_m u * phi(t)
    dW = g^T X   d_addend = g       d_bias = sum_m dy         d_out_scale = sum_m dy * z

drop and undrop multiply by the same mask and divide by the kept fraction (reference/dropout.py).
Computed in float32, or float64 where x is float64, and rounded once: this is the oracle.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels.reference.dropout import keep_mask, kept_fraction


class Gradients(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    core: Tensor | None
    in_scale: Tensor | None
    out_scale: Tensor | None
    addend: Tensor | None


def activate(t: Tensor, activation: str) -> Tensor:
    match activation:
        case "identity":
            return t
        case "relu":
            return F.relu(t)
        case "silu":
            return F.silu(t)
        case "gelu":
            return F.gelu(t)
        case _:
            return torch.tanh(t)


def activation_derivative(t: Tensor, activation: str) -> Tensor:
    """phi'(t).  relu has 0 at 0, as in PyTorch."""
    match activation:
        case "identity":
            return torch.ones_like(t)
        case "relu":
            return (t > 0).to(t.dtype)
        case "silu":
            s = torch.sigmoid(t)
            return s * (1 + t * (1 - s))
        case "gelu":
            density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(t / math.sqrt(2))) + t * density
        case _:
            return 1 - torch.tanh(t) ** 2


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
    """y, z [M, N] in x's dtype, t [M, r] in down's dtype (None without down)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    X = x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)
    z = X @ weight.to(wide).T
    t = None
    if down is not None and up is not None:
        t = _drop(X, seed, dropout) @ down.to(wide).T
        v = activate(t, activation)
        v = v if core is None else v * core.to(wide)
        z = z + scale * (v @ up.to(wide).T)
    z = z if addend is None else z + addend.to(wide)
    y = z if out_scale is None else z * out_scale.to(wide)
    y = y if bias is None else y + bias.to(wide)
    kept_t = None if t is None or down is None else t.to(torch.promote_types(down.dtype, x.dtype))
    return y.to(x.dtype), kept_t, z.to(x.dtype) if keep_z else None


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
    """The gradients that ``needs`` (nine bools, in the order of Gradients) asks for.

    x may be None unless weight, down or in_scale needs its gradient; t unless up or core does or
    phi is not the identity; z unless out_scale does.
    """
    need: Any = Gradients(*needs)
    wide = torch.promote_types(dy.dtype, torch.float32)
    dy = dy.to(wide)
    g = dy if out_scale is None else dy * out_scale.to(wide)
    X = None
    if x is not None:
        X = x.to(wide) if in_scale is None else x.to(wide) * in_scale.to(wide)

    dt = d_up = d_core = None
    if down is not None and up is not None:
        u = scale * (g @ up.to(wide))
        dt = u if core is None else u * core.to(wide)
        if t is not None:
            phi = activate(t.to(wide), activation)
            v = phi if core is None else phi * core.to(wide)
            d_up = scale * (g.T @ v) if need.up else None
            d_core = (u * phi).sum(0) if need.core else None
            dt = dt * activation_derivative(t.to(wide), activation)

    d_down = d_x = d_in = None
    if need.down and dt is not None and X is not None:
        d_down = dt.T @ _drop(X, seed, dropout)
    if need.x or need.in_scale:
        d_X = g @ weight.to(wide)
        if dt is not None and down is not None:
            d_X = d_X + _drop(dt @ down.to(wide), seed, dropout)
        d_x = d_X if in_scale is None else d_X * in_scale.to(wide)
        if need.in_scale and x is not None:
            d_in = (x.to(wide) * d_X).sum(0)
    d_weight = g.T @ X if need.weight and X is not None else None
    d_bias = dy.sum(0) if need.bias else None
    d_out = (dy * z.to(wide)).sum(0) if need.out_scale and z is not None else None
    d_addend = g if need.addend else None
    return Gradients(d_x, d_weight, d_bias, d_down, d_up, d_core, d_in, d_out, d_addend)


def merged_weight(
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """out_scale * (W + scale * B core A) * in_scale, [N, K], rounded once to W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide)
    if down is not None and up is not None:
        B = up.to(wide) if core is None else up.to(wide) * core.to(wide)
        merged = merged + scale * (B @ down.to(wide))
    merged = merged if out_scale is None else out_scale.to(wide)[:, None] * merged
    merged = merged if in_scale is None else merged * in_scale.to(wide)
    return merged.to(weight.dtype)


def _drop(X: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if p == 0.0 or seed is None:
        return X
    M, K = X.shape
    return X * keep_mask(seed, (M, K), p) / kept_fraction(p)
