"""SVDiff (Han et al. 2023, arXiv:2303.11305): shift the singular values, none below zero.

    W' = U diag(relu(sigma + delta)) V^T = W + U diag(max(delta, -sigma)) V^T
    delta [k] zeros, k = min(N, K)
    U = left [N, k], sigma = singular_values [k], V^T = right [k, K]: those of W, frozen buffers

Written as a change of W the start is exact.  As with relu, a component at zero has no gradient.
The vectors have W's dtype whatever the adapter's is: together they are two copies of a square W.
"""

import torch

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors, SingularDiagonal
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.spectral_additive import compact


@method("svdiff")
class SVDiff(Method):
    formula = "U diag(relu(sigma + delta)) V^T"
    citation = "arXiv:2303.11305"
    trains = "min(N, K)"
    impls = dispatch.NOT_NATIVE

    def create(self, adapter: Adapter, base: Base) -> None:
        U, S, Vt = base.svd()
        adapter.register_buffer("left", compact(U, base.weight.dtype))
        adapter.register_buffer("singular_values", compact(S, S.dtype))
        adapter.register_buffer("right", compact(Vt, base.weight.dtype))
        adapter.delta = base.scales(len(S), fill=0.0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        sigma, delta = adapter.singular_values, adapter.delta
        change = torch.where(sigma + delta > 0, delta, -sigma)
        return Factors(weight_map=SingularDiagonal(adapter.left, change, adapter.right))
