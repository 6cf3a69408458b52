"""W_eff = W, and W_eff[rows_j, cols_j] += values_j as an operator (maths: reference/scatter.py).

``build`` and ``contract`` are what ops/decomposed_linear.py's Function calls in forward and
backward; the effective weight is built again there, not kept.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import Scatter
from decomp_kernels.kernels.aten import scatter as aten
from decomp_kernels.ops.autocast import outside_autocast
from decomp_kernels.ops.implementation import files, implementation, work
from decomp_kernels.ops.weight_map import check_tensors
from decomp_kernels.reference import scatter as reference

ACTS_ON_INPUT = False

_MAP = "Tensor rows, Tensor cols, Tensor values, str impl"

_FILES = files(triton="scatter", native={"native:passes": "scatter"})

# On a CPU, with more than one value in this many, the library's product of all is about as fast as
# dot products of our own (512 tokens, 1024 and 2048, both dtypes: at one in 4 these take 0.35 to
# 0.8 of its time, one thread).
SPARSE = 4

torch.library.define("decomp_kernels::scatter_build", f"(Tensor weight, {_MAP}) -> Tensor")
torch.library.define(
    "decomp_kernels::scatter_contract", f"(Tensor weight, Tensor g, Tensor x, {_MAP}) -> Tensor"
)


@torch.library.impl("decomp_kernels::scatter_build", "CompositeExplicitAutograd")
@outside_autocast
def _build(weight, rows, cols, values, impl):
    built = _implementation(weight, weight, impl, "forward").build(
        Scatter(rows, cols, values), weight
    )
    return built.contiguous()


@torch.library.impl("decomp_kernels::scatter_contract", "CompositeExplicitAutograd")
@outside_autocast
def _contract(weight, g, x, rows, cols, values, impl):
    many = values.numel() * SPARSE > weight.numel()
    if many and g.is_cpu and dispatch.named(impl) == "auto":
        impl = "aten"
    chosen = _implementation(weight, g, impl, "backward")
    return chosen.contract(Scatter(rows, cols, values), weight, g, x)


@torch.library.register_fake("decomp_kernels::scatter_build")
def _build_fake(weight, rows, cols, values, impl):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("decomp_kernels::scatter_contract")
def _contract_fake(weight, g, x, rows, cols, values, impl):
    return values.new_empty(values.shape)


def _implementation(weight: Tensor, rows: Tensor, impl: str, direction: str):
    asked = work("scatter", direction, rows, weight, None)
    return implementation(weight, impl, reference, aten, _FILES, asked)


build_op = torch.ops.decomp_kernels.scatter_build.default
contract_op = torch.ops.decomp_kernels.scatter_contract.default


def check(m: Scatter, weight: Tensor) -> None:
    """Raise ValueError or TypeError where the map does not fit; positions are not looked at."""
    expected = {"rows": ("n",), "cols": ("n",), "values": ("n",)}
    check_tensors(m, weight, expected, indices="rows cols")


def build(m: Scatter, weight: Tensor, impl: str) -> Tensor:
    return build_op(weight, m.rows, m.cols, m.values, impl)


def contract(
    m: Scatter, weight: Tensor, g: Tensor, x: Tensor, impl: str
) -> tuple[Tensor | None, ...]:
    """The gradient of values, from g = out_scale * dy [M, N] and x = in_scale * x [M, K]."""
    return None, None, contract_op(weight, g, x, m.rows, m.cols, m.values, impl)


def dense(m: Scatter, weight: Tensor) -> Tensor:
    """W_eff with plain autograd through it: for a base weight that is trained itself."""
    return reference.build(m, weight)
