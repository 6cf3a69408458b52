"""W_eff = W * (1 + scale * up @ down) as an operator (maths: reference/hadamard.py).

``build`` and ``contract`` are what ops/decomposed_linear.py's Function calls in forward and
backward; the effective weight is built again there, not kept.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Hadamard
from decomp_kernels.kernels.aten import hadamard as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.weight_map import check_tensors
from decomp_kernels.reference import hadamard as reference

ACTS_ON_INPUT = False

_FILES = files(triton="hadamard")

torch.library.define(
    "decomp_kernels::hadamard_build",
    "(Tensor weight, Tensor up, Tensor down, float scale, str impl) -> Tensor",
)
torch.library.define(
    "decomp_kernels::hadamard_contract",
    "(Tensor weight, Tensor g, Tensor x, Tensor up, Tensor down, float scale, str impl)"
    " -> (Tensor d_up, Tensor d_down)",
)


@torch.library.impl("decomp_kernels::hadamard_build", "CompositeExplicitAutograd")
@outside_autocast
def _build(weight, up, down, scale, impl):
    return _implementation(weight, impl).build(Hadamard(up, down, scale), weight).contiguous()


@torch.library.impl("decomp_kernels::hadamard_contract", "CompositeExplicitAutograd")
@outside_autocast
def _contract(weight, g, x, up, down, scale, impl):
    return _implementation(weight, impl).contract(Hadamard(up, down, scale), weight, g, x)


@torch.library.register_fake("decomp_kernels::hadamard_build")
def _build_fake(weight, up, down, scale, impl):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("decomp_kernels::hadamard_contract")
def _contract_fake(weight, g, x, up, down, scale, impl):
    return up.new_empty(up.shape), down.new_empty(down.shape)


def _implementation(weight: Tensor, impl: str):
    return implementation(weight, impl, reference, aten, _FILES)


build_op = torch.ops.decomp_kernels.hadamard_build.default
contract_op = torch.ops.decomp_kernels.hadamard_contract.default


def check(m: Hadamard, weight: Tensor) -> None:
    """Raise ValueError or TypeError where the map does not fit the weight [N, K]."""
    N, K = weight.shape
    check_tensors(m, weight, {"up": (N, "r"), "down": ("r", K)})


def build(m: Hadamard, weight: Tensor, impl: str) -> Tensor:
    return build_op(weight, m.up, m.down, m.scale, impl)


def contract(m: Hadamard, weight: Tensor, g: Tensor, x: Tensor, impl: str) -> tuple[Tensor, ...]:
    """The gradients of up and down, from g = out_scale * dy [M, N] and x = in_scale * x [M, K]."""
    return contract_op(weight, g, x, m.up, m.down, m.scale, impl)


def dense(m: Hadamard, weight: Tensor) -> Tensor:
    """W_eff with plain autograd through it: for a base weight that is trained itself."""
    return reference.build(m, weight)
