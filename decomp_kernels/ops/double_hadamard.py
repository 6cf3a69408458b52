"""W_eff = W + scale * (up1 @ down1) * (up2 @ down2) as an operator
(maths: reference/double_hadamard.py).

``build`` and ``contract`` are what ops/decomposed_linear.py's Function calls in forward and
backward; the effective weight is built again there, not kept.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import DoubleHadamard
from decomp_kernels.kernels.aten import double_hadamard as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation
from decomp_kernels.ops.weight_map import check_tensors
from decomp_kernels.reference import double_hadamard as reference

ACTS_ON_INPUT = False

_MAP = "Tensor up1, Tensor down1, Tensor up2, Tensor down2, float scale, str impl"

_FILES = files(triton="double_hadamard")

torch.library.define("decomp_kernels::double_hadamard_build", f"(Tensor weight, {_MAP}) -> Tensor")
torch.library.define(
    "decomp_kernels::double_hadamard_contract",
    f"(Tensor weight, Tensor g, Tensor x, {_MAP})"
    " -> (Tensor d_up1, Tensor d_down1, Tensor d_up2, Tensor d_down2)",
)


@torch.library.impl("decomp_kernels::double_hadamard_build", "CompositeExplicitAutograd")
@outside_autocast
def _build(weight, up1, down1, up2, down2, scale, impl):
    m = DoubleHadamard(up1, down1, up2, down2, scale)
    return _implementation(weight, impl).build(m, weight).contiguous()


@torch.library.impl("decomp_kernels::double_hadamard_contract", "CompositeExplicitAutograd")
@outside_autocast
def _contract(weight, g, x, up1, down1, up2, down2, scale, impl):
    m = DoubleHadamard(up1, down1, up2, down2, scale)
    return _implementation(weight, impl).contract(m, weight, g, x)


@torch.library.register_fake("decomp_kernels::double_hadamard_build")
def _build_fake(weight, up1, down1, up2, down2, scale, impl):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("decomp_kernels::double_hadamard_contract")
def _contract_fake(weight, g, x, up1, down1, up2, down2, scale, impl):
    return tuple(t.new_empty(t.shape) for t in (up1, down1, up2, down2))


def _implementation(weight: Tensor, impl: str):
    return implementation(weight, impl, reference, aten, _FILES)


build_op = torch.ops.decomp_kernels.double_hadamard_build.default
contract_op = torch.ops.decomp_kernels.double_hadamard_contract.default


def check(m: DoubleHadamard, weight: Tensor) -> None:
    """Raise ValueError or TypeError where the map does not fit the weight [N, K]."""
    N, K = weight.shape
    check_tensors(
        m,
        weight,
        {"up1": (N, "r1"), "down1": ("r1", K), "up2": (N, "r2"), "down2": ("r2", K)},
    )


def build(m: DoubleHadamard, weight: Tensor, impl: str) -> Tensor:
    return build_op(weight, m.up1, m.down1, m.up2, m.down2, m.scale, impl)


def contract(
    m: DoubleHadamard, weight: Tensor, g: Tensor, x: Tensor, impl: str
) -> tuple[Tensor, ...]:
    """The four gradients, from g = out_scale * dy [M, N] and x = in_scale * x [M, K]."""
    return contract_op(weight, g, x, m.up1, m.down1, m.up2, m.down2, m.scale, impl)


def dense(m: DoubleHadamard, weight: Tensor) -> Tensor:
    """W_eff with plain autograd through it: for a base weight that is trained itself."""
    return reference.build(m, weight)
