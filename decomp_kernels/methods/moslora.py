"""MoSLoRA (Wu et al. 2024, arXiv:2406.11909): a learned mixer of the low-rank subspaces.

    W' = W + s B G A        s = alpha / r
    A [r, K] and the mixer G [r, r] uniform as nn.Linear's weight    B [N, r] zeros: exact start

The algebra is FLoRA's; what differs is which factor starts at zero.
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method


@method("moslora")
class MoSLoRA(LowRank):
    formula = "W + s B G A"
    citation = "arXiv:2406.11909"
    trains = "r (N + K) + r^2"

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)
        adapter.core_matrix = base.kaiming(self.r, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down,
            up=adapter.up @ adapter.core_matrix,
            scale=self.scale,
            activation=self.activation,
        )
