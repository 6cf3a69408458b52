"""Several decomposed linears of one x in library calls (maths: reference/grouped_linear.py).

Branches without dropout are one wide branch: their A's stand one below the other, so that x is read
once for every t and once for every dA, and what they add to dx is one product.  A branch with
dropout has a mask of its own and reads x for itself.  The gradients of x add up in one buffer: the
branches first, then the base GEMMs with beta = 1 in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decomp_kernels.kernels import columns, composition, gemm
from decomp_kernels.reference.decomposed_linear import Gradients, activate
from decomp_kernels.reference.grouped_linear import Layer


def forward(
    x: Tensor, layers: Sequence[Layer]
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    x = composition.contiguous(x)
    found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for layer, t in zip(layers, _projections(x, layers), strict=True):
        bias, up = layer.bias, layer.up
        start = None if bias is None or layer.out_scale is not None else bias.to(x.dtype)
        if t is not None and up is not None:
            v = composition.times(activate(t, layer.activation), layer.core, layer.scale)
            start = gemm.expand(v, up.T, start, x.dtype)
        y, z = composition.base(x, layer.weight, start, layer.in_scale, layer.out_scale, bias)
        found.append((y, t, z))
    return found


def _projections(x: Tensor, layers: Sequence[Layer]) -> list[Tensor | None]:
    ts: list[Tensor | None] = [None] * len(layers)
    plain = {}
    for i, layer in enumerate(layers):
        if layer.down is not None:
            down = composition.scaled_down(layer.down, layer.in_scale)
            if layer.dropping:
                ts[i] = composition.project_dropped(x, down, layer.seed, layer.dropout)
            else:
                plain[i] = down
    if plain:
        t = gemm.project(x, torch.cat(list(plain.values())).T)
        parts = t.split([len(down) for down in plain.values()], 1)
        for i, part in zip(plain, parts, strict=True):
            ts[i] = part.contiguous()
    return ts


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Layer],
    ts: Sequence[Tensor | None],
    zs: Sequence[Tensor | None],
    needs: Sequence[Gradients],
) -> tuple[Tensor | None, list[Gradients]]:
    x = None if x is None else composition.contiguous(x)
    dys = [composition.contiguous(dy) for dy in dys]
    over = [_over_dy(*each) for each in zip(dys, layers, ts, zs, needs, strict=True)]
    dts = [dt for _, dt, _ in over]
    d_downs = _plain_downs(x, layers, dts, needs)
    adding = [
        i for i, layer in enumerate(layers)
        if layer.in_scale is None and not layer.dropping and dts[i] is not None and needs[i].x
    ]  # fmt: skip
    d_x: Tensor | None = None
    if adding:
        small: list[Any] = [layers[i].down for i in adding]
        wide = torch.cat([_some(dts[i]) for i in adding], 1)
        d_x = gemm.expand(wide, torch.cat(small), None, dys[0].dtype)
    own: dict[int, Tensor | None] = {}  # buffers of layers whose in_scale is still to multiply dX
    for i, (layer, dt, need) in enumerate(zip(layers, dts, needs, strict=True)):
        if dt is not None and layer.down is not None and i not in adding:
            alone = layer.in_scale is not None
            part, d_down = composition.to_input(
                dt, x, layer.down, layer.in_scale, layer.seed if layer.dropping else None,
                layer.dropout, dys[i].dtype, bool(need.x or need.in_scale),
                bool(need.down) and i not in d_downs, None if alone else d_x,
            )  # fmt: skip
            d_downs.setdefault(i, d_down)
            if alone:
                own[i] = part
            elif part is not None:
                d_x = part
    d_ins: dict[int, Tensor | None] = {}
    for i in sorted(range(len(layers)), key=lambda i: layers[i].in_scale is not None):
        g, layer, need = over[i][0], layers[i], needs[i]
        if not (need.x or need.in_scale):
            continue
        start = d_x if layer.in_scale is None else own.get(i)
        d_X: Any = g @ layer.weight if start is None else gemm.accumulate(start, g, layer.weight)
        if layer.in_scale is not None:
            d_X, d_ins[i], _ = columns.scale_columns_backward(
                d_X, x, layer.in_scale,
                scaled=bool(need.x), summed=bool(need.in_scale), shift=False,
            )  # fmt: skip
        if need.x:
            d_x = d_X if d_x is None or d_X is d_x else d_x.add_(d_X)
    return d_x, [
        grads._replace(down=d_downs.get(i), in_scale=d_ins.get(i))
        for i, (_, _, grads) in enumerate(over)
    ]


def _over_dy(
    dy: Tensor, layer: Layer, t: Tensor | None, z: Tensor | None, need: Any
) -> tuple[Tensor, Tensor | None, Gradients]:
    """g, dt, and the gradients that come from dy alone."""
    need_dX = bool(need.x or need.in_scale)
    g, d_out, d_bias = composition.over_scale(
        dy, z, layer.bias, layer.out_scale, scaled=need_dX, need=need
    )
    dt = d_up = d_core = None
    if layer.up is not None:
        dt, d_up, d_core = composition.low_rank(
            dy, layer.up, layer.core, layer.out_scale, t, layer.scale, layer.activation,
            needs=(bool(need_dX or need.down), bool(need.up), bool(need.core)),
        )  # fmt: skip
    return g, dt, Gradients(None, None, d_bias, None, d_up, d_core, None, d_out, None)


def _plain_downs(
    x: Tensor | None,
    layers: Sequence[Layer],
    dts: Sequence[Tensor | None],
    needs: Sequence[Gradients],
) -> dict[int, Tensor | None]:
    """d_down of the branches without dropout, by layer: one read of x."""
    plain = [
        i for i, layer in enumerate(layers)
        if needs[i].down and not layer.dropping and dts[i] is not None
    ]  # fmt: skip
    if not plain or x is None:
        return {}
    ranks = [_some(dts[i]).shape[1] for i in plain]
    product = composition.over_rows(x, None, torch.cat([_some(dts[i]) for i in plain], 1))[1]
    d_downs: dict[int, Tensor | None] = {}
    for i, part in zip(plain, _some(product).split(ranks), strict=True):
        in_scale = layers[i].in_scale
        d_downs[i] = part.contiguous() if in_scale is None else (part * in_scale).to(part.dtype)
    return d_downs


def _some(t: Tensor | None) -> Tensor:
    if t is None:
        raise RuntimeError("a gradient that was asked for is missing")
    return t
