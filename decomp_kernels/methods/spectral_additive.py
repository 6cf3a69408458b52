"""Spectral Adapter, additive (Zhang and Pilanci 2024, arXiv:2405.13952): tune singular vectors.

    W' = U_rest S_rest V_rest^T + (U_r + P) S_r (V_r + Q)^T   is computed as
    W' = W + s [P, U_r] diag(S_r, S_r) [(V_r + Q)^T; Q^T]

P = up_offset [N, r] and Q^T = down_offset [r, K] start at zero, so the start is exact.  U_r, S_r,
V_r^T are the top singular triplets, frozen buffers.  W is not split, so nothing is rounded anew.
s = 1 as published.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method


@method("spectral_additive")
class SpectralAdditive(Method):
    """r: singular directions that are tuned.  scale: s, of the whole update."""

    formula = "W + s ((U_r + P) S_r (V_r + Q)^T - U_r S_r V_r^T)"
    citation = "arXiv:2405.13952"
    trains = "r (N + K)"
    full_rank_limit = True

    r: int = 8
    scale: float = 1.0
    dropout: float = 0.0

    def create(self, adapter: Adapter, base: Base) -> None:
        U, S, Vt = base.svd()
        adapter.down_offset = base.matrix(self.r, base.in_features)
        adapter.up_offset = base.matrix(base.out_features, self.r)
        adapter.register_buffer("singular_up", compact(U[:, : self.r], base.dtype))
        adapter.register_buffer("singular_down", compact(Vt[: self.r], base.dtype))
        adapter.register_buffer("singular_values", compact(S[: self.r], S.dtype))

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=torch.cat((adapter.singular_down + adapter.down_offset, adapter.down_offset)),
            up=torch.cat((adapter.up_offset, adapter.singular_up), 1),
            core=adapter.singular_values.repeat(2),
            scale=self.scale,
        )


def compact(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A row-major copy of a slice, which would otherwise keep the whole decomposition alive."""
    return part.to(dtype).clone(memory_format=torch.contiguous_format)
