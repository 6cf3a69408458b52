"""W_eff = W R^T, R a product of permuted block diagonals, as an operator
(maths: reference/block_rotate.py).

R acts on x alone, so its gradient needs no gradient of a whole weight: ``backward`` takes the
gradient through W itself and gives d_blocks and dx.  Where something adds to that gradient (a
low-rank branch, in_scale), ``contract`` makes it with a GEMM of its own.  ``build`` makes the
weight of the forward GEMM, 2 N K b operations; ``forward`` rotates x, 2 M K b, for few tokens.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels.aten import block_rotate as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.weight_map import check_tensors
from decomp_kernels.reference import block_rotate as reference

ACTS_ON_INPUT = True

_MAP = "Tensor blocks, Tensor? permutations, str impl"

_FILES = files(triton="block_rotate")
_ONE_FACTOR = files(triton="block_rotate", native={"native:passes": "block_rotate"})

torch.library.define("decomp_kernels::block_rotate_build", f"(Tensor weight, {_MAP}) -> Tensor")
torch.library.define("decomp_kernels::block_rotate_fwd", f"(Tensor x, {_MAP}) -> Tensor")
torch.library.define(
    "decomp_kernels::block_rotate_contract",
    f"(Tensor weight, Tensor g, Tensor x, {_MAP}) -> Tensor",
)
torch.library.define(
    "decomp_kernels::block_rotate_bwd",
    f"(Tensor gx, Tensor x, {_MAP}) -> (Tensor d_blocks, Tensor dx)",
)


@torch.library.impl("decomp_kernels::block_rotate_build", "CompositeExplicitAutograd")
@outside_autocast
def _build(weight, blocks, permutations, impl):
    m = BlockRotate(blocks, permutations)
    return _implementation(m, weight, impl, "forward").build(m, weight).contiguous()


@torch.library.impl("decomp_kernels::block_rotate_fwd", "CompositeExplicitAutograd")
@outside_autocast
def _fwd(x, blocks, permutations, impl):
    m = BlockRotate(blocks, permutations)
    turned = _implementation(m, x, impl, "forward").forward(m, x.reshape(-1, x.shape[-1]))
    return torch.ops.aten._unsafe_view(turned.contiguous(), x.shape)


@torch.library.impl("decomp_kernels::block_rotate_contract", "CompositeExplicitAutograd")
@outside_autocast
def _contract(weight, g, x, blocks, permutations, impl):
    m = BlockRotate(blocks, permutations)
    return _implementation(m, x, impl, "backward").contract(m, weight, g, x)


@torch.library.impl("decomp_kernels::block_rotate_bwd", "CompositeExplicitAutograd")
@outside_autocast
def _bwd(gx, x, blocks, permutations, impl):
    m = BlockRotate(blocks, permutations)
    d_blocks, dx = _implementation(m, x, impl, "backward").backward(m, gx, x)
    return d_blocks, dx.contiguous()


@torch.library.register_fake("decomp_kernels::block_rotate_build")
def _build_fake(weight, blocks, permutations, impl):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("decomp_kernels::block_rotate_fwd")
def _fwd_fake(x, blocks, permutations, impl):
    return x.new_empty(x.shape)


@torch.library.register_fake("decomp_kernels::block_rotate_contract")
def _contract_fake(weight, g, x, blocks, permutations, impl):
    return blocks.new_empty(blocks.shape)


@torch.library.register_fake("decomp_kernels::block_rotate_bwd")
def _bwd_fake(gx, x, blocks, permutations, impl):
    return blocks.new_empty(blocks.shape), gx.new_empty(gx.shape)


def _implementation(m: BlockRotate, rows: Tensor, impl: str, direction: str):
    """rows: the matrix that is rotated, x or the weight."""

    def asked() -> dispatch.Work:
        M, b = rows.numel() // max(rows.shape[-1], 1), m.blocks.shape[-1]
        base, adapter = dispatch.dtype_names(rows, m.blocks)
        return dispatch.Work("block_rotate", direction, M, rows.numel(), b, base, adapter)

    one = m.permutations is None and m.blocks.shape[0] == 1
    return implementation(rows, impl, reference, aten, _ONE_FACTOR if one else _FILES, asked)


build_op = torch.ops.decomp_kernels.block_rotate_build.default
fwd_op = torch.ops.decomp_kernels.block_rotate_fwd.default
contract_op = torch.ops.decomp_kernels.block_rotate_contract.default
bwd_op = torch.ops.decomp_kernels.block_rotate_bwd.default


def check(m: BlockRotate, weight: Tensor) -> None:
    """Raise ValueError or TypeError where the map does not fit the weight [N, K]."""
    K = weight.shape[1]
    sizes = check_tensors(
        m,
        weight,
        {"blocks": ("m", "q", "b", "b"), "permutations": ("m", K)},
        indices="permutations",
    )
    if sizes["q"] * sizes["b"] != K or sizes["m"] < 1:
        raise ValueError(
            f"BlockRotate's blocks must be [m, q, b, b] with q * b = K = {K} and m at least 1, "
            f"got {tuple(m.blocks.shape)}"
        )


def build(m: BlockRotate, weight: Tensor, impl: str) -> Tensor:
    return build_op(weight, m.blocks, m.permutations, impl)


def forward(m: BlockRotate, x: Tensor, impl: str) -> Tensor:
    """x R of x [..., K]."""
    return fwd_op(x, m.blocks, m.permutations, impl)


def contract(
    m: BlockRotate, weight: Tensor, g: Tensor, x: Tensor, impl: str
) -> tuple[Tensor | None, ...]:
    """The gradient of blocks, from g = out_scale * dy [M, N] and x = in_scale * x [M, K]."""
    return _with_none(m, contract_op(weight, g, x, m.blocks, m.permutations, impl))


def backward(
    m: BlockRotate, gx: Tensor, x: Tensor, impl: str
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """(the gradient of blocks, dx) from gx = g W [M, K] and x [M, K]."""
    d_blocks, dx = bwd_op(gx, x, m.blocks, m.permutations, impl)
    return _with_none(m, d_blocks), dx


def dense(m: BlockRotate, weight: Tensor) -> Tensor:
    """W_eff with plain autograd through it: for a base weight that is trained itself."""
    return reference.build(m, weight)


def _with_none(m: BlockRotate, d_blocks: Tensor) -> tuple[Tensor | None, ...]:
    return (d_blocks,) if m.permutations is None else (d_blocks, None)
