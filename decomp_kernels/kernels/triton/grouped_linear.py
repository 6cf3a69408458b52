"""Several decomposed linears of one x in passes (maths: reference/grouped_linear.py).

x is read once for every t, and in backward once for every dA, each with its own mask in registers.
The branches' parts of dx are summed in one write of one buffer, to which the base GEMMs add with
beta = 1.  A layer with in_scale has a buffer of its own until a pass over x has multiplied it and
taken d_in_scale; the first such pass is the one for dA.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from decomp_kernels.kernels import columns, composition, gemm
from decomp_kernels.kernels.triton.column_walk import Left, walk_columns
from decomp_kernels.kernels.triton.down_projection import Adapter, down_projections
from decomp_kernels.kernels.triton.over_dy import over_dy
from decomp_kernels.kernels.triton.up_expansion import Expansion, up_expansion, up_expansions
from decomp_kernels.reference.decomposed_linear import Gradients
from decomp_kernels.reference.grouped_linear import Layer


def forward(
    x: Tensor, layers: Sequence[Layer]
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    x = x.contiguous()
    branches = {i: layer for i, layer in enumerate(layers) if layer.down is not None}
    adapters = [_adapter(layer) for layer in branches.values()]
    projected = down_projections(x, adapters) if adapters else []
    at: dict[int, Any] = dict(zip(branches, projected, strict=True))
    found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for i, layer in enumerate(layers):
        t, v = at.get(i, (None, None))
        start = None if layer.bias is None or layer.out_scale is not None else layer.bias
        if layer.up is not None:
            start = up_expansion(v, layer.up.T, x.dtype, bias=start)
        elif start is not None:
            start = start.to(x.dtype)
        y, z = composition.base(x, layer.weight, start, layer.in_scale, layer.out_scale, layer.bias)
        found.append((y, t, z))
    return found


def _adapter(layer: Layer) -> Adapter:
    down: Any = layer.down
    return Adapter(
        down, layer.in_scale, layer.seed, layer.dropout, layer.core, layer.scale, layer.activation
    )


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Layer],
    ts: Sequence[Tensor | None],
    zs: Sequence[Tensor | None],
    needs: Sequence[Gradients],
) -> tuple[Tensor | None, list[Gradients]]:
    dys = [dy.contiguous() for dy in dys]
    x = None if x is None else x.contiguous()
    over = [
        over_dy(
            dy,
            layer.up,
            layer.core,
            layer.out_scale,
            t,
            z,
            layer.seed,
            layer.scale,
            layer.dropout,
            layer.activation,
            need,
        )
        for dy, layer, t, z, need in zip(dys, layers, ts, zs, needs, strict=True)
    ]
    dts: list[Any] = [dt for dt, _, _ in over]

    shared = [i for i, layer in enumerate(layers) if layer.in_scale is None and needs[i].x]
    d_x = _to_input(shared, dys, layers, dts) if shared else None

    lefts = {
        i: Left(dts[i], layer.seed, layer.dropout)
        for i, layer in enumerate(layers)
        if dts[i] is not None and needs[i].down
    }
    products: dict[int, Tensor] = {}  # dA before in_scale
    d_ins: dict[int, Tensor | None] = {}
    for i, layer in enumerate(layers):
        if layer.in_scale is None or not (needs[i].x or needs[i].in_scale):
            continue
        d_X = _to_input([i], dys, layers, dts)
        if x is not None and (lefts or needs[i].in_scale):
            walked = walk_columns(x, list(lefts.values()), other=d_X, scale=layer.in_scale)
            products |= zip(lefts, walked.c, strict=True)
            lefts, d_ins[i], d_X = {}, walked.p, walked.scaled
        else:
            d_X = columns.scale_columns(d_X, layer.in_scale)
        if needs[i].x:
            d_x = d_X if d_x is None else d_x.add_(d_X)
    if lefts and x is not None:
        products |= zip(lefts, walk_columns(x, list(lefts.values())).c, strict=True)

    found = []
    for i, (layer, (_, grads, _)) in enumerate(zip(layers, over, strict=True)):
        d_down = products.get(i)
        if d_down is not None and layer.in_scale is not None:
            d_down = d_down * layer.in_scale
        found.append(grads._replace(down=d_down, in_scale=d_ins.get(i)))
    return d_x, found


def _to_input(
    some: list[int], dys: Sequence[Tensor], layers: Sequence[Layer], dts: list[Any]
) -> Any:
    """sum over ``some`` of g W + undrop(dt A), a new [M, K] tensor."""
    parts = [
        Expansion(dts[i], layers[i].down, layers[i].seed, layers[i].dropout)  # type: ignore[arg-type]
        for i in some
        if dts[i] is not None
    ]
    d_X = up_expansions(parts, dys[0].dtype) if parts else None
    for i in some:
        out_scale, weight = layers[i].out_scale, layers[i].weight
        g = dys[i] if out_scale is None else columns.scale_columns(dys[i], out_scale)
        d_X = g @ weight if d_X is None else gemm.accumulate(d_X, g, weight)
    return d_X
