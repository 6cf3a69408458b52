"""Row norms of W + scale * B A as an operator: schema, fakes, dispatch, autograd.

Formula and gradients: reference/row_norm.py.  DoRA (arXiv 2402.09353) divides its magnitude by it.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels.aten import row_norm as aten
from decomp_kernels.ops.autocast import no_autocast, outside_autocast
from decomp_kernels.ops.frozen_matmul import frozen_matmul
from decomp_kernels.ops.implementation import files, implementation, work
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.ops.tiled_weight import tiled
from decomp_kernels.ops.traced import is_symbol
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.reference import row_norm as reference

_FILES = files(triton="row_norm", native="row_norm")

torch.library.define("decomp_kernels::squared_rows", "(Tensor weight) -> Tensor")
torch.library.define(
    "decomp_kernels::row_norm_fwd",
    "(Tensor weight, Tensor weight_sq, Tensor down, Tensor up, float scale, str impl) -> Tensor",
)
torch.library.define(
    "decomp_kernels::row_norm_bwd",
    "(Tensor d_norm, Tensor norm, Tensor weight, Tensor down, Tensor up, float scale, str impl)"
    " -> (Tensor, Tensor)",
)


@torch.library.impl("decomp_kernels::squared_rows", "CompositeExplicitAutograd")
def _squared_rows(weight):
    """By what was measured fastest: its one call a layer has no ``impl``."""
    asked = work("squared_rows", "forward", weight, weight, None)
    if dispatch.fastest(weight, dispatch.NATIVE_FORMS, asked) in dispatch.NATIVE_FORMS:
        return implementation(weight, "native:passes", reference, aten, _FILES).squared_rows(weight)
    return aten.squared_rows(weight)


@outside_autocast
def _forward(weight, weight_sq, down, up, scale, impl):
    chosen = _implementation(weight, down, "forward", impl)
    if chosen is reference:
        return reference.forward(weight, down, up, scale)
    return chosen.forward(weight, weight_sq, down, up, scale)


@outside_autocast
def _backward(d_norm, norm, weight, down, up, scale, impl):
    chosen = _implementation(weight, down, "backward", impl)
    d_down, d_up = chosen.backward(d_norm, norm, weight, down, up, scale)
    return d_down.to(down.dtype).contiguous(), d_up.to(up.dtype).contiguous()


torch.library.impl("decomp_kernels::row_norm_fwd", "CompositeExplicitAutograd", _forward)
torch.library.impl("decomp_kernels::row_norm_bwd", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("decomp_kernels::squared_rows")
def _squared_rows_fake(weight):
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(weight.shape[0], dtype=wide)


@torch.library.register_fake("decomp_kernels::row_norm_fwd")
def _fwd_fake(weight, weight_sq, down, up, scale, impl):
    return torch.empty_like(weight_sq)


@torch.library.register_fake("decomp_kernels::row_norm_bwd")
def _bwd_fake(d_norm, norm, weight, down, up, scale, impl):
    return down.new_empty(down.shape), up.new_empty(up.shape)


def _implementation(weight: Tensor, down: Tensor, direction: str, impl: str):
    asked = work("row_norm", direction, weight, weight, down)
    return implementation(weight, impl, reference, aten, _FILES, asked)


squared_rows_op = torch.ops.decomp_kernels.squared_rows.default
fwd = torch.ops.decomp_kernels.row_norm_fwd.default
bwd = torch.ops.decomp_kernels.row_norm_bwd.default


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, weight_sq, down, up, scale, impl):
        run = fwd if torch.compiler.is_compiling() else _forward
        norm = run(weight, weight_sq, down, up, scale, impl)
        ctx.save_for_backward(norm, weight, down, up)
        ctx.scale, ctx.impl = scale, impl
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx, d_norm):
        run = bwd if torch.compiler.is_compiling() else _backward
        d_down, d_up = run(d_norm, *ctx.saved_tensors, ctx.scale, ctx.impl)
        return None, None, d_down, d_up, None, None


def squared_rows(weight: Tensor | QuantizedWeight) -> Tensor:
    """||W_j||^2, [N], float32 or wider."""
    if isinstance(weight, Tensor):
        return squared_rows_op(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    tiled(weight, "auto").each_row_tile(
        wide, lambda rows, W: torch.sum(W.square_(), 1, out=out[rows])
    )
    return out


def row_norm(
    weight: Tensor | QuantizedWeight,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    *,
    weight_sq: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``||(weight + scale * up @ down)_j||_2``, [N], without forming up @ down.

    weight [N, K], frozen: it gets no gradient.  down [r, K] and up [N, r] of one dtype, the
    weight's or float32.  weight_sq: ``squared_rows(weight)`` where the caller keeps it.  Returns
    float32, or float64 for a float64 weight; bf16 operands are multiplied exactly and summed in
    float32.  Raises ValueError where shapes do not fit.
    """
    if weight.dim() != 2 or down.dim() != 2 or up.dim() != 2:
        raise ValueError("weight, down and up must be matrices: [N, K], [r, K], [N, r]")
    N, K = weight.shape
    if down.shape[1] != K or up.shape != (N, down.shape[0]):
        raise ValueError(
            f"down must be (r, {K}) and up ({N}, r), got {tuple(down.shape)} and {tuple(up.shape)}"
        )
    if is_symbol(scale):
        wide = torch.promote_types(up.dtype, torch.float32)
        down, up, scale = down.to(wide), up.to(wide) * scale, 1.0
    weight = weight.detach()
    weight_sq = squared_rows(weight) if weight_sq is None else weight_sq
    if isinstance(weight, QuantizedWeight):
        return _of_quantized(weight, weight_sq, down, up, scale)
    return _RowNorm.apply(weight, weight_sq, down, up, scale, impl)


def _of_quantized(
    weight: QuantizedWeight, weight_sq: Tensor, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """As kernels/aten/row_norm.py: the one product with W is an operator, the rest is small."""
    with no_autocast(weight.device):
        A, B = down.to(weight_sq.dtype), up.to(weight_sq.dtype)
        U = frozen_matmul(weight, A.T)
        inner = torch.addmm(U, B, A @ A.T, beta=2.0, alpha=scale)
        return (weight_sq + scale * (inner * B).sum(1)).clamp_min(0).sqrt()
