"""MiLoRA (Wang et al. 2024, arXiv:2406.09044): train the minor singular directions.

    W' = W + s (B A - B0 A0)        s = alpha / r

B0 and A0 come from the r smallest singular triplets.  The form, and why W stays as it is: pissa.py.
"""

from torch import Tensor

from decomp_kernels.methods.base import Base, method
from decomp_kernels.methods.pissa import SingularStart


@method("milora")
class MiLoRA(SingularStart):
    formula = "W + s (B A - B0 A0)"
    citation = "arXiv:2406.09044"
    trains = "r (N + K)"

    def triplets(self, base: Base) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vt = base.svd()
        return U[:, -self.r :], S[-self.r :], Vt[-self.r :]
