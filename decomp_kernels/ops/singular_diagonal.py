"""W_eff = W + left @ diag(diagonal) @ right as an operator (maths: reference/singular_diagonal.py).

Two routes.  The weight route, ``build`` and ``contract``: 2 N K k operations for W_eff, in forward
and again in backward.  The activation route, ``as_low_rank``: a branch of rank k with frozen
factors, 2 M k (N + K) operations each way and no x kept.  The second is cheaper for few tokens.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import SingularDiagonal
from decomp_kernels.kernels.aten import singular_diagonal as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.traced import less
from decomp_kernels.ops.weight_map import check_tensors
from decomp_kernels.reference import singular_diagonal as reference

ACTS_ON_INPUT = False

_MAP = "Tensor left, Tensor diagonal, Tensor right, str impl"

_FILES = files(triton="singular_diagonal")

torch.library.define(
    "decomp_kernels::singular_diagonal_build", f"(Tensor weight, {_MAP}) -> Tensor"
)
torch.library.define(
    "decomp_kernels::singular_diagonal_contract",
    f"(Tensor weight, Tensor g, Tensor x, {_MAP}) -> Tensor",
)


@torch.library.impl("decomp_kernels::singular_diagonal_build", "CompositeExplicitAutograd")
@outside_autocast
def _build(weight, left, diagonal, right, impl):
    return (
        _implementation(weight, impl)
        .build(SingularDiagonal(left, diagonal, right), weight)
        .contiguous()
    )


@torch.library.impl("decomp_kernels::singular_diagonal_contract", "CompositeExplicitAutograd")
@outside_autocast
def _contract(weight, g, x, left, diagonal, right, impl):
    m = SingularDiagonal(left, diagonal, right)
    return _implementation(weight, impl).contract(m, weight, g, x)


@torch.library.register_fake("decomp_kernels::singular_diagonal_build")
def _build_fake(weight, left, diagonal, right, impl):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("decomp_kernels::singular_diagonal_contract")
def _contract_fake(weight, g, x, left, diagonal, right, impl):
    return diagonal.new_empty(diagonal.shape)


def _implementation(weight: Tensor, impl: str):
    return implementation(weight, impl, reference, aten, _FILES)


build_op = torch.ops.decomp_kernels.singular_diagonal_build.default
contract_op = torch.ops.decomp_kernels.singular_diagonal_contract.default


def check(m: SingularDiagonal, weight: Tensor) -> None:
    """Raise ValueError or TypeError where the map does not fit the weight [N, K]."""
    N, K = weight.shape
    check_tensors(m, weight, {"left": (N, "k"), "diagonal": ("k",), "right": ("k", K)})
    if m.left.dtype != m.right.dtype:
        raise TypeError(
            f"SingularDiagonal's left and right must have one dtype, got {m.left.dtype} and "
            f"{m.right.dtype}"
        )
    if m.left.requires_grad or m.right.requires_grad:
        raise ValueError(
            "SingularDiagonal's left and right are frozen: detach them, or pass them as up and "
            "down with core=diagonal to train them"
        )


def build(m: SingularDiagonal, weight: Tensor, impl: str) -> Tensor:
    return build_op(weight, m.left, m.diagonal, m.right, impl)


def contract(
    m: SingularDiagonal, weight: Tensor, g: Tensor, x: Tensor, impl: str
) -> tuple[Tensor | None, ...]:
    """The gradient of diagonal, from g = out_scale * dy [M, N] and x = in_scale * x [M, K]."""
    return None, contract_op(weight, g, x, m.left, m.diagonal, m.right, impl), None


def dense(m: SingularDiagonal, weight: Tensor) -> Tensor:
    """W_eff with plain autograd through it: for a base weight that is trained itself."""
    return reference.build(m, weight)


def as_low_rank(m: SingularDiagonal, tokens: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(down, up, core) of the low-rank branch that is the same change, where that is cheaper.

    Forward and backward cost 4 M k (N + K) as a branch and 4 N K k + 2 M k (N + K) as a weight:
    the branch wins below 2 N K / (N + K) tokens, which is never less than k.
    """
    return (m.right, m.left, m.diagonal) if less(tokens, m.diagonal.shape[0]) else None
