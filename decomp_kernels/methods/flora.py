"""FLoRA (Si et al. 2024, arXiv:2405.14739): a full core matrix between the low-rank factors.

    W' = W + s B G A        s = alpha / r
    A [r, K], B [N, r] normal with deviation 0.02        G [r, r] zeros, so the start is exact

Lowered to up = B G: r x r work only.  With an activation the branch is phi(x A^T) G^T B^T.
(Not the method of arXiv:2402.03293, which has nearly the same name.)
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method


@method("flora")
class FLoRA(LowRank):
    formula = "W + s B G A"
    citation = "arXiv:2405.14739"
    trains = "r (N + K) + r^2"

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.normal(self.r, base.in_features, std=0.02)
        adapter.up = base.normal(base.out_features, self.r, std=0.02)
        adapter.core_matrix = base.matrix(self.r, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down,
            up=adapter.up @ adapter.core_matrix,
            scale=self.scale,
            activation=self.activation,
        )
