"""LieRA (Si et al. 2025, arXiv:2504.00851): a low-rank change relative to each weight.

    W' = W * (1 + s B A)        s = alpha / r        * by entries
    A [r, K] uniform as nn.Linear's weight        B [N, r] zeros, so the start is exact

The paper's map on the multiplicative group is W * exp(dW); this is its first-order form.
"""

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors, Hadamard
from decomp_kernels.methods.base import Adapter, Base, Method, method


@method("liera")
class LieRA(Method):
    """r: rank.  alpha: the change is scaled by alpha / r."""

    formula = "W * (1 + s B A)"
    citation = "arXiv:2504.00851"
    trains = "r (N + K)"
    peft = "HiraConfig, with s folded into B"
    impls = dispatch.NOT_NATIVE

    r: int = 8
    alpha: float = 8.0

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(weight_map=Hadamard(adapter.up, adapter.down, self.scale))
