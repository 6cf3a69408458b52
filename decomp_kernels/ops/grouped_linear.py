"""Several decomposed linears of one x as one operator: schema, fakes, dispatch, autograd.

Formula and gradients: reference/grouped_linear.py.  x is read once for all branches, and the
gradients of x add up in one buffer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels.aten import grouped_linear as aten
from decomp_kernels.ops.arguments import check_arguments, check_seed
from decomp_kernels.ops.autocast import autocast_dtype, outside_autocast
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.dropout import draw_seed
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.reference import grouped_linear as reference
from decomp_kernels.reference.decomposed_linear import Gradients
from decomp_kernels.reference.dropout import threshold
from decomp_kernels.reference.grouped_linear import Layer

TENSORS = ("weight", "bias", "down", "up", "core", "in_scale", "out_scale", "seed")
TRAINED = TENSORS[1:-1]
OPTIONS = {"scale": 1.0, "dropout": 0.0, "activation": "identity"}
ALONE = ("addend", "weight_map", "save_output")  # what a layer of a group cannot have

_LAYERS = (
    "Tensor[] weights, Tensor?[] biases, Tensor?[] downs, Tensor?[] ups, Tensor?[] cores, "
    "Tensor?[] in_scales, Tensor?[] out_scales, Tensor?[] seeds, "
    "float[] scales, float[] dropouts, str[] activations, "
)

_FILES = files(triton="grouped_linear")

torch.library.define(
    "decomp_kernels::grouped_linear_fwd",
    f"(Tensor x, {_LAYERS}bool[] keep, str impl) -> (Tensor[] ys, Tensor[] ts, Tensor[] zs)",
)
torch.library.define(
    "decomp_kernels::grouped_linear_bwd",
    f"(Tensor[] dys, Tensor? x, {_LAYERS}Tensor?[] ts, Tensor?[] zs, bool[] needs, str impl)"
    " -> (Tensor d_x, Tensor[] grads)",
)


@torch.library.impl("decomp_kernels::grouped_linear_fwd", "CompositeExplicitAutograd")
@outside_autocast
def _fwd(x, *others):
    """y, t and z of each layer; of a layer's two ``keep``, t and z are there where they say so."""
    *parts, keep, impl = others
    layers = [Layer(*part) for part in zip(*parts, strict=True)]
    chosen = implementation(x, impl, reference, aten, _FILES)
    ys, ts, zs = zip(*chosen.forward(x.reshape(-1, x.shape[-1]), layers), strict=True)
    lead = x.shape[:-1]
    return (
        [y if len(lead) == 1 else _unsafe_view(y, (*lead, y.shape[-1])) for y in ys],
        [t if kept else _absent(x) for t, kept in zip(ts, keep[0::2], strict=True)],
        [z if kept else _absent(x) for z, kept in zip(zs, keep[1::2], strict=True)],
    )


@torch.library.impl("decomp_kernels::grouped_linear_bwd", "CompositeExplicitAutograd")
@outside_autocast
def _bwd(dys, x, *others):
    """The gradient of x, and those of TRAINED layer by layer; empty where ``needs`` says no.

    needs: whether x's, then of each layer those of TRAINED.
    """
    *parts, ts, zs, needs, impl = others
    layers = [Layer(*part) for part in zip(*parts, strict=True)]
    chosen = implementation(dys[0], impl, reference, aten, _FILES)
    lead, K = dys[0].shape[:-1], layers[0].weight.shape[1]
    d_x, found = chosen.backward(
        [dy.reshape(-1, dy.shape[-1]) for dy in dys],
        None if x is None else x.reshape(-1, K),
        layers, ts, zs, [_needs(needs[0], of) for of in _by_layer(needs[1:])],
    )  # fmt: skip
    d_x = _absent(dys[0]) if d_x is None else d_x.to(dys[0].dtype).view(*lead, K)
    return d_x, [
        _absent(dys[0]) if grad is None else grad.to(getattr(layer, name).dtype)
        for layer, grads in zip(layers, found, strict=True)
        for name, grad in ((name, getattr(grads, name)) for name in TRAINED)
    ]


@torch.library.register_fake("decomp_kernels::grouped_linear_fwd")
def _fwd_fake(x, weights, biases, downs, *others):
    *_, keep, _ = others
    tokens = math.prod(x.shape[:-1])
    keep_t, keep_z = keep[0::2], keep[1::2]
    return (
        [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights],
        [
            down.new_empty((tokens, down.shape[0])) if kept else _absent(x)
            for down, kept in zip(downs, keep_t, strict=True)
        ],
        [
            x.new_empty((tokens, weight.shape[0])) if kept else _absent(x)
            for weight, kept in zip(weights, keep_z, strict=True)
        ],
    )


@torch.library.register_fake("decomp_kernels::grouped_linear_bwd")
def _bwd_fake(dys, x, *others):
    *parts, _, _, needs, _ = others
    layers = [Layer(*part) for part in zip(*parts, strict=True)]
    d_x = dys[0].new_empty((*dys[0].shape[:-1], layers[0].weight.shape[1]))
    grads = []
    for layer, need in zip(layers, _by_layer(needs[1:]), strict=True):
        for name, wanted in zip(TRAINED, need, strict=True):
            like = getattr(layer, name)
            grads.append(like.new_empty(like.shape) if wanted else _absent(dys[0]))
    return d_x if needs[0] else _absent(dys[0]), grads


def _needs(need_x: bool, trained: Sequence[bool]) -> Any:
    return Gradients(need_x, False, *trained, False)  # type: ignore[arg-type, call-arg]


def _by_layer(flat: Sequence[Any], size: int = len(TRAINED)) -> list[Sequence[Any]]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


_unsafe_view = torch.ops.aten._unsafe_view.default
fwd = torch.ops.decomp_kernels.grouped_linear_fwd.default
bwd = torch.ops.decomp_kernels.grouped_linear_bwd.default


class _Options(NamedTuple):
    """What the Function needs beside its tensors; the tuples hold a value for each layer."""

    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    activations: tuple[str, ...]
    compute: torch.dtype | None  # autocast's dtype, else None
    impl: str


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, x, *tensors):
        need_x = ctx.needs_input_grad[1]
        keep, keep_x, needs = [], False, [need_x]
        for number, need in enumerate(_by_layer(ctx.needs_input_grad[2:], len(TENSORS))):
            _, _, down, up, core, in_scale, out_scale, _ = need
            curved = options.activations[number] != "identity" and (need_x or in_scale or down)
            keep += [bool(up or core or curved), out_scale]
            keep_x = keep_x or down or in_scale
            needs += need[1:-1]
        # A layer without a branch has no t.
        downs = tensors[TENSORS.index("down") :: len(TENSORS)]
        keep[0::2] = [
            kept and down is not None for kept, down in zip(keep[0::2], downs, strict=True)
        ]
        ys, ts, zs = fwd(_to(x, options.compute), *_columns(tensors, options), keep, options.impl)
        ctx.options, ctx.keep, ctx.needs, ctx.x_dtype = options, keep, needs, x.dtype
        ctx.save_for_backward(x if keep_x else None, *ts, *zs, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        options, count = ctx.options, len(dys)
        x, *saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor a single time
        ts, zs, tensors = saved[:count], saved[count : 2 * count], saved[2 * count :]
        ts = [t if kept else None for t, kept in zip(ts, ctx.keep[0::2], strict=True)]
        zs = [z if kept else None for z, kept in zip(zs, ctx.keep[1::2], strict=True)]
        d_x, grads = bwd(
            list(dys), _to(x, options.compute), *_columns(tensors, options), ts, zs, ctx.needs,
            options.impl,
        )  # fmt: skip
        shown: list[Tensor | None] = []
        layers = _by_layer(tensors, len(TENSORS))
        for layer, found, need in zip(
            layers, _by_layer(grads), _by_layer(ctx.needs[1:]), strict=True
        ):
            shown.append(None)  # of the weight; the seed's comes last
            shown += [
                g.to(t.dtype) if n else None
                for t, g, n in zip(layer[1:-1], found, need, strict=True)
            ]
            shown.append(None)
        return None, d_x.to(ctx.x_dtype) if ctx.needs[0] else None, *shown


def _columns(tensors: Sequence[Tensor | None], options: _Options) -> tuple[Any, ...]:
    """The operators' arguments of all layers, in autocast's dtype where it would cast."""
    cast = ("weight", "down", "up")
    lists = [
        [_to(t, options.compute if name in cast else None) for t in tensors[place :: len(TENSORS)]]
        for place, name in enumerate(TENSORS)
    ]
    return (*lists, options.scales, options.dropouts, options.activations)


def _to(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return t if t is None or dtype is None else t.to(dtype)


def decomposed_linears(
    x: Tensor, layers: Sequence[Mapping[str, Any]], *, impl: str = "auto"
) -> list[Tensor]:
    """``decomposed_linear(x, **layer)`` of each of ``layers``, which share x (q, k and v).

    A layer's mapping holds arguments of decomposed_linear by name; "weight" must be there.  Layers
    may differ in everything but the dtype of their ``down``.  x is read once for all branches, each
    with its own dropout mask, and the gradients of x add up in one buffer.  Seeds that are not
    given are drawn in the layers' order: the masks are those of separate calls.

    A layer whose weight requires grad or is quantised, or with addend, weight_map or save_output,
    is a call of its own, and so is every layer where the downs differ in dtype.  Raises ValueError
    or TypeError before any work where the arguments do not fit.
    """
    dispatch.check(impl)
    given = [_checked(x, number, layer) for number, layer in enumerate(layers)]
    joined = [number for number, layer in enumerate(given) if _joins(layer)]
    kinds = {given[n]["down"].dtype for n in joined if given[n]["down"] is not None}
    if len(joined) < 2 or (len(kinds) > 1 and autocast_dtype(x) is None):
        joined = []
    ys: dict[int, Tensor] = {}
    if joined:
        options = _Options(
            **{f"{name}s": tuple(given[n][name] for n in joined) for name in OPTIONS},
            compute=autocast_dtype(x),
            impl=impl,
        )
        tensors = [given[n][name] for n in joined for name in TENSORS]
        ys |= zip(joined, _GroupedLinear.apply(options, x, *tensors), strict=True)
    for number, layer in enumerate(given):
        if number not in ys:
            ys[number] = decomposed_linear(x, **layer, impl=impl)
    return [ys[number] for number in range(len(given))]


def _joins(layer: dict[str, Any]) -> bool:
    """Whether it may share the operator."""
    frozen = isinstance(layer["weight"], Tensor) and not layer["weight"].requires_grad
    alone = not frozen or layer.get("save_output", False)
    return not alone and layer.get("addend") is None and layer.get("weight_map") is None


def _checked(x: Tensor, number: int, layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's arguments, all of them, with a seed where it needs one."""
    known = (*TENSORS, *OPTIONS, *ALONE)
    if unknown := [name for name in layer if name not in known]:
        raise TypeError(
            f"layers[{number}] has {unknown[0]!r}, which is no argument of a layer; "
            f"it may have {', '.join(known)}"
        )
    if "weight" not in layer:
        raise TypeError(f"layers[{number}] must have a weight, got {', '.join(layer) or 'nothing'}")
    full = {**dict.fromkeys(TENSORS), **OPTIONS, **layer}
    try:
        check_arguments(
            x,
            addend=full.get("addend"),
            **{name: full[name] for name in (*TENSORS[:-1], "activation", "dropout")},
        )
        check_seed(full["seed"], x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layers[{number}]: {error}") from None
    if threshold(full["dropout"]) == 0 or full["down"] is None:
        full |= {"dropout": 0.0, "seed": None}
    elif full["seed"] is None:
        full["seed"] = draw_seed(x)
    full["scale"] = float(full["scale"])
    return full
