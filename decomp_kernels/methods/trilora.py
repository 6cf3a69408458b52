"""TriLoRA (Feng et al. 2024, arXiv:2405.11236): a diagonal core between the low-rank factors.

    W' = W + s B diag(e) A        s = alpha / r, or fixed_scale
    A [r, K], B [N, r] uniform as nn.Linear's weight        e = core [r] zeros

The start is exact, and on the first step e alone has a gradient.  One published implementation
leaves s out; that is ``fixed_scale=1.0`` here.
"""

import math

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method


@method("trilora")
class TriLoRA(LowRank):
    """fixed_scale: s itself, where it is not to follow alpha and r."""

    formula = "W + s B diag(e) A"
    citation = "arXiv:2405.11236"
    trains = "r (N + K) + r"

    fixed_scale: float | None = None

    @property
    def scale(self) -> float:
        if self.fixed_scale is not None:
            return self.fixed_scale
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.kaiming(base.out_features, self.r)
        adapter.core = base.scales(self.r, fill=0.0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down,
            up=adapter.up,
            core=adapter.core,
            scale=self.scale,
            activation=self.activation,
        )
