"""SAM-PARSER (Peng et al. 2023, arXiv:2308.14604): train the singular values alone.

    W' = U diag(sigma + delta) V^T = W + U diag(delta) V^T        delta [k] zeros, k = min(N, K)
    U = left [N, k], V^T = right [k, K]: the singular vectors of W, frozen buffers

Written as a change of W the start is exact, where U diag(sigma) V^T would round.  The vectors have
W's dtype whatever the adapter's is: together they are as large as two copies of a square W.
"""

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors, SingularDiagonal
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.spectral_additive import compact


@method("sam_parser")
class SAMParser(Method):
    formula = "U diag(sigma') V^T"
    citation = "arXiv:2308.14604"
    trains = "min(N, K)"
    impls = dispatch.NOT_NATIVE

    def create(self, adapter: Adapter, base: Base) -> None:
        U, S, Vt = base.svd()
        adapter.register_buffer("left", compact(U, base.weight.dtype))
        adapter.register_buffer("right", compact(Vt, base.weight.dtype))
        adapter.delta = base.scales(len(S), fill=0.0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(weight_map=SingularDiagonal(adapter.left, adapter.delta, adapter.right))
