"""The decomposed linear as an operator: schema, fakes, dispatch, autograd.

Formula and gradients: reference/decomposed_linear.py.  Tensors may have any leading dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import SingularDiagonal, WeightMap
from decomp_kernels.kernels.aten import decomposed_linear as aten
from decomp_kernels.kernels.columns import scale_columns
from decomp_kernels.ops.arguments import check_arguments, check_seed
from decomp_kernels.ops.autocast import autocast_dtype, outside_autocast
from decomp_kernels.ops.autograd_node import autograd_node
from decomp_kernels.ops.base_weight import (
    Options,
    acts_on_input,
    as_one,
    as_three,
    cast,
    dense,
    effective,
    frozen,
    made_map,
    map_op,
)
from decomp_kernels.ops.implementation import files, implementation, work
from decomp_kernels.ops.map_ops import MAP_OPS
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.ops.traced import less, with_number
from decomp_kernels.quantized_weight import QuantizedWeight, dense_shape
from decomp_kernels.reference import decomposed_linear as reference
from decomp_kernels.reference.decomposed_linear import Gradients
from decomp_kernels.reference.dropout import threshold

_SHARED = (
    "Tensor weight, Tensor? weight_scale, str weight_format, Tensor? bias, "
    "Tensor? down, Tensor? up, Tensor? core, Tensor? in_scale, Tensor? out_scale, "
)
_FILES = files(
    triton={"triton:passes": "decomposed_linear", "triton:fused": "decomposed_linear_fused"},
    native={"native:passes": "decomposed_linear", "native:fused": "decomposed_linear_fused"},
)
_OPTIONS = "Tensor? seed, float scale, float dropout, str activation, "

_unsafe_view = torch.ops.aten._unsafe_view.default

torch.library.define(
    "decomp_kernels::decomposed_linear_fwd",
    f"(Tensor x, {_SHARED}Tensor? addend, {_OPTIONS}bool[] keep, str impl) "
    "-> (Tensor y, Tensor t, Tensor z)",
)
torch.library.define(
    "decomp_kernels::decomposed_linear_bwd",
    f"(Tensor dy, Tensor? x, {_SHARED}Tensor? t, Tensor? z, {_OPTIONS}bool[] needs, str impl) -> ("
    + ", ".join(f"Tensor d_{name}" for name in Gradients._fields)
    + ")",
)


@outside_autocast
def _forward(
    x, weight, bias, down, up, core, in_scale, out_scale, addend, seed, scale, dropout, activation,
    keep, impl,
):  # fmt: skip
    """y [..., N], and t [M, r] and z [M, N] where ``keep`` asks for them, else None."""
    N, K = weight.shape
    matrix = x.dim() == 2
    keep_t, keep_z = keep
    asked = work("decomposed_linear", "forward", x, weight, down, dropout, out_scale)
    chosen, weight = _implementation(x, weight, impl, asked)
    y, t, z = chosen.forward(
        x if matrix else x.reshape(-1, K), weight, bias, down, up, core, in_scale, out_scale,
        None if addend is None else addend.reshape(-1, N), seed, scale, dropout, activation,
        keep_z,
    )  # fmt: skip
    y = y if matrix else _unsafe_view(y, (*x.shape[:-1], N))
    return y, t if keep_t else None, z


@outside_autocast
def _backward(
    dy, x, weight, bias, down, up, core, in_scale, out_scale, t, z, seed, scale, dropout,
    activation, needs, impl,
):  # fmt: skip
    """Gradients: each in its tensor's shape and dtype, None where it is not asked for."""
    N, K = weight.shape
    matrix = dy.dim() == 2
    asked = work("decomposed_linear", "backward", dy, weight, down, dropout, out_scale)
    chosen, weight = _implementation(dy, weight, impl, asked)
    grads = chosen.backward(
        dy if matrix else dy.reshape(-1, N),
        x if x is None or matrix else x.reshape(-1, K),
        weight, bias, down, up, core, in_scale, out_scale, t, z, seed, scale, dropout, activation,
        needs,
    )  # fmt: skip
    likes = (dy, dy, bias, down, up, core, in_scale, out_scale, dy)
    grads = Gradients(
        *(
            grad if grad is None or grad.dtype == like.dtype else grad.to(like.dtype)
            for grad, like in zip(grads, likes, strict=True)
        )
    )
    if not matrix:
        lead = dy.shape[:-1]
        d_x = None if grads.x is None else grads.x.view(*lead, K)
        d_addend = None if grads.addend is None else grads.addend.view(*lead, N)
        grads = grads._replace(x=d_x, addend=d_addend)
    return grads


def _implementation(x, weight, impl, asked):
    """(the module, the weight as it takes it)."""
    if isinstance(weight, Tensor):
        return implementation(x, impl, reference, aten, _FILES, asked), weight
    if (named := dispatch.named(impl)) not in dispatch.TAKE_QUANTIZED:
        raise RuntimeError(
            f"impl={named!r} cannot run on a quantised weight; use impl='aten', 'native:passes' or "
            "'auto'"
        )
    some = {form: file for form, file in _FILES.items() if form in dispatch.TAKE_QUANTIZED}
    chosen = implementation(x, impl, reference, aten, some, asked)
    if chosen is reference:
        weight = weight.dense(torch.promote_types(x.dtype, torch.float32))
    return chosen, weight


@torch.library.impl("decomp_kernels::decomposed_linear_fwd", "CompositeExplicitAutograd")
def _fwd(x, weight, weight_scale, weight_format, *others):
    weight = as_one(weight, weight_scale, weight_format, others[-1])
    y, t, z = _forward(x, weight, *others)
    return y, _absent(x) if t is None else t, _absent(x) if z is None else z


@torch.library.impl("decomp_kernels::decomposed_linear_bwd", "CompositeExplicitAutograd")
def _bwd(dy, x, weight, weight_scale, weight_format, *others):
    weight = as_one(weight, weight_scale, weight_format, others[-1])
    grads = _backward(dy, x, weight, *others)
    return tuple(_absent(dy) if grad is None else grad for grad in grads)


@torch.library.register_fake("decomp_kernels::decomposed_linear_fwd")
def _fwd_fake(
    x, weight, weight_scale, weight_format, bias, down, up, core, in_scale, out_scale, addend,
    seed, scale, dropout, activation, keep, impl,
):  # fmt: skip
    N = weight.shape[0]
    tokens = math.prod(x.shape[:-1])
    keep_t, keep_z = keep
    y = x.new_empty((*x.shape[:-1], N))
    t = down.new_empty((tokens, down.shape[0])) if keep_t and down is not None else _absent(x)
    return y, t, x.new_empty((tokens, N)) if keep_z else _absent(x)


@torch.library.register_fake("decomp_kernels::decomposed_linear_bwd")
def _bwd_fake(
    dy, x, weight, weight_scale, weight_format, bias, down, up, core, in_scale, out_scale,
    t, z, seed, scale, dropout, activation, needs, impl,
):  # fmt: skip
    K = weight.shape[1] if weight_scale is None else dense_shape(weight, weight_format)[1]
    fake = _bwd_shapes(dy, K, weight, bias, down, up, core, in_scale, out_scale, needs)
    # Contiguous whatever the layout of the tensor that the gradient is for.
    return tuple(_absent(dy) if like is None else like.new_empty(like.shape) for like in fake)


def _bwd_shapes(dy, K, weight, bias, down, up, core, in_scale, out_scale, needs):
    """A tensor of the shape and dtype of each gradient asked for, None for the others."""
    need = Gradients(*needs)
    return (
        dy.new_empty((*dy.shape[:-1], K)) if need.x else None,
        weight if need.weight else None,
        bias if need.bias else None,
        down if need.down else None,
        up if need.up else None,
        core if need.core else None,
        in_scale if need.in_scale else None,
        out_scale if need.out_scale else None,
        dy if need.addend else None,
    )


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0)


fwd = torch.ops.decomp_kernels.decomposed_linear_fwd.default
bwd = torch.ops.decomp_kernels.decomposed_linear_bwd.default


class _DecomposedLinear(torch.autograd.Function):
    """A compiler is shown the operators; eager calls their bodies, without the dispatcher between:
    docs/performance.md has what that saves.
    """

    @staticmethod
    def forward(ctx, options, *tensors):  # not one by one: see ops/traced.py
        x, weight, bias, down, up, core, in_scale, out_scale, addend, seed = tensors[:10]
        others = tensors[10:]
        inputs = ctx.needs_input_grad
        asked = inputs if options.differentiated else (False,) * len(inputs)
        need: Any = Gradients(*asked[1:10])
        need_map = any(asked[11:])
        compute = options.compute
        scales, mapped = others[: options.scales], others[options.scales :]
        curved = options.activation != "identity" and (need.x or need.in_scale or need.down)
        keep_t = bool(need.up or need.core or curved)
        keep_z = bool(need.out_scale) and not options.save_output
        keep_x = need.weight or need.down or need.in_scale or need_map
        cast_x, cast_weight = cast(x, compute), frozen(options, weight, scales)
        on_input = acts_on_input(options, down, in_scale)
        if on_input and (scales or less(x.numel(), weight.numel())):
            m = made_map(options, mapped)
            cast_x = map_op(options).forward(m, cast_x, options.impl)
        else:
            cast_weight = effective(options, cast_weight, mapped, cast_x.dtype)
        terms = (
            bias, cast(down, compute), cast(up, compute), core, in_scale, out_scale,
            cast(addend, compute), seed, options.scale, options.dropout, options.activation,
            [keep_t, keep_z], options.impl,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            y, t, z = fwd(cast_x, *as_three(cast_weight), *terms)
        else:
            y, t, z = _forward(cast_x, cast_weight, *terms)
        ctx.options, ctx.x_dtype = options, x.dtype
        ctx.addend_dtype = None if addend is None else addend.dtype
        ctx.save_for_backward(
            x if keep_x else None, weight, bias, down, up, core, in_scale, out_scale, seed,
            t if keep_t else None, z if keep_z else None,
            y if need.out_scale and options.save_output else None, *others,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        options: Options = ctx.options
        saved = ctx.saved_tensors  # once: checkpointing unpacks each tensor a single time
        x, weight, bias, down, up, core, in_scale, out_scale, seed, t, z, y = saved[:12]
        scales, mapped = saved[12 : 12 + options.scales], saved[12 + options.scales :]
        need: Any = Gradients(*ctx.needs_input_grad[1:10])
        need_map = any(ctx.needs_input_grad[11:])
        compute = options.compute
        cast_x, cast_weight = cast(x, compute), frozen(options, weight, scales)
        if y is not None:  # save_output: z = y / out_scale
            z = scale_columns(y.reshape(-1, y.shape[-1]), out_scale.reciprocal())
        rotates = need_map and acts_on_input(options, down, in_scale)
        base = cast_weight if rotates else effective(options, cast_weight, mapped, dy.dtype)
        asked = [bool(wanted) for wanted in need]
        asked[0] = bool(need.x or rotates)
        asked[-1] = bool(need.addend and out_scale is not None)
        terms = (
            bias, cast(down, compute), cast(up, compute), core, in_scale, out_scale, t, z, seed,
            options.scale, options.dropout, options.activation, asked, options.impl,
        )  # fmt: skip
        grads: Any
        if torch.compiler.is_compiling():
            grads = Gradients(*bwd(dy, cast_x, *as_three(base), *terms))
        else:
            grads = _backward(dy, cast_x, base, *terms)
        map_grads: tuple[Tensor | None, ...] = (None,) * len(mapped)
        if need_map:
            m = made_map(options, mapped)
            X = cast_x.reshape(-1, cast_x.shape[-1])
            if rotates:
                map_grads, dX = map_op(options).backward(
                    m, grads.x.reshape(X.shape), X, options.impl
                )
                grads = grads._replace(x=dX.reshape(x.shape))
            else:
                g = dy.reshape(-1, dy.shape[-1])
                g = g if out_scale is None else scale_columns(g.contiguous(), out_scale)
                X = X if in_scale is None else scale_columns(X.contiguous(), in_scale)
                map_grads = map_op(options).contract(
                    m, dense(cast_weight, dy.dtype), g, X, options.impl
                )
        if need.addend and out_scale is None:
            grads = grads._replace(addend=dy)
        shown = [grad if wanted else None for grad, wanted in zip(grads, need, strict=True)]
        if compute is not None:  # back from autocast's dtype
            originals = (
                ctx.x_dtype, weight.dtype, None, None if down is None else down.dtype,
                None if up is None else up.dtype, None, None, None, ctx.addend_dtype,
            )  # fmt: skip
            shown = [
                grad if grad is None or dtype is None else grad.to(dtype)
                for grad, dtype in zip(shown, originals, strict=True)
            ]
        return None, *shown, None, *(None for _ in scales), *map_grads


def decomposed_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    core: Tensor | None = None,
    scale: float = 1.0,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    addend: Tensor | None = None,
    activation: str = "identity",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    weight_map: WeightMap | None = None,
    save_output: bool = False,
    impl: str = "auto",
) -> Tensor:
    """``out_scale * (X W_eff^T + scale * (phi(drop(X) down^T) * core) up^T + addend) + bias``.

    X = x * in_scale, phi = ``activation`` (identity, relu, silu, gelu, tanh) and W_eff is
    ``weight``, or ``weight_map`` of it.  arXiv 2407.05417: its methods are choices of these terms.

    x [..., K] and weight [N, K] have one dtype (float32, bfloat16, float16; float64 is computed in
    float64 throughout).  down [r, K] and up [N, r] have that dtype or float32, and the rank-r work
    keeps the precision of theirs.  core [r], in_scale [K], out_scale [N], bias [N]: any of these
    floating dtypes, used in float32.  addend [..., N].  Returns y [..., N] in x's dtype, or in
    autocast's.

    A QuantizedWeight is multiplied in x's dtype, in dense tiles of which none is kept; a weight map
    makes a dense copy for a moment.  impl is "reference", "aten" or "native:passes" then.

    ``dropout`` in [0, 1) drops elements of X for the low-rank branch alone.  The mask is made by
    a counter (reference/dropout.py) from ``seed``, an int64 scalar tensor, drawn from torch's
    generator where it is not given, and is made again in backward: nothing is kept for it.
    ``save_output`` keeps y instead of the tensor before out_scale (see factors.Factors).

    Gradients: every tensor argument that requires grad, by hand-written formulas
    (reference/decomposed_linear.py); none of a gradient's second order.  Raises ValueError or
    TypeError before any work where shapes, dtypes, devices or options do not fit.
    """
    check_arguments(
        x, weight, bias, down, up, core, in_scale, out_scale, addend, activation, dropout
    )
    check_seed(seed, x)
    if save_output and bias is not None and out_scale is not None:
        raise ValueError(
            "save_output=True needs a layer without bias: the gradient of out_scale is taken from "
            "y / out_scale; leave save_output=False for this layer"
        )
    dispatch.check(impl)
    if weight_map is not None:
        op_of_map = MAP_OPS[weight_map.op]
        op_of_map.check(weight_map, weight)
        if weight.requires_grad:
            # The gradient of a trained base weight is dense, and so is its way through the map.
            weight, weight_map = op_of_map.dense(weight_map, weight), None
        elif isinstance(weight_map, SingularDiagonal) and down is None:
            branch = op_of_map.as_low_rank(weight_map, math.prod(x.shape[:-1]))
            if branch is not None:
                (down, up, core), weight_map = branch, None
                scale, dropout, activation = 1.0, 0.0, "identity"  # what a branch alone would use
    scale, core = with_number(scale, core, down)
    if threshold(dropout) == 0 or down is None:
        dropout, seed = 0.0, None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)
    if weight_map is None and addend is None and not save_output:
        terms = weight, bias, down, up, core, in_scale, out_scale
        if (one_call := autograd_node(x, terms, seed, activation, impl)) is not None:
            node, passes = one_call
            return node(x, *terms, seed, scale, dropout, passes)
    named = weight_map.named_tensors() if weight_map is not None else {}
    codes, *scales = weight.tensors() if isinstance(weight, QuantizedWeight) else (weight,)
    options = Options(
        scale=scale,
        dropout=dropout,
        activation=activation,
        save_output=save_output,
        compute=autocast_dtype(x),
        weight_format=getattr(weight, "format", "dense"),
        scales=len(scales),
        map_kind=None if weight_map is None else type(weight_map),
        map_names=tuple(named),
        map_scale=getattr(weight_map, "scale", None),
        impl=impl,
        differentiated=torch.is_grad_enabled(),
    )
    return _DecomposedLinear.apply(
        options, x, codes, bias, down, up, core, in_scale, out_scale, addend, seed, *scales,
        *named.values(),
    )  # fmt: skip
