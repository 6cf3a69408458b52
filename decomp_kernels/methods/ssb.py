"""SSB (Si, Yang, Shen 2024, arXiv:2407.05417): scale the subspace of both singular vector sets.

W' = diag(out_scale) W diag(in_scale)        y = out_scale * ((x * in_scale) W^T) + b
in_scale [K], out_scale [N], ones at the start; the bias is not scaled
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method


@method("ssb")
class SSB(Method):
    formula = "diag(s_out) W diag(s_in)"
    citation = "arXiv:2407.05417"
    trains = "N + K"

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.in_scale = base.scales(base.in_features)
        adapter.out_scale = base.scales(base.out_features)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(in_scale=adapter.in_scale, out_scale=adapter.out_scale)
