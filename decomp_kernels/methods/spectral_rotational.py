"""Spectral Adapter, rotational (Zhang and Pilanci 2024, arXiv:2405.13952): turn singular vectors.

    W' = W + U_r G V_r^T,    G = R_U diag(S_r c) R_V^T - diag(S_r)        R = (I - Q)(I + Q)^-1
    Q = (D - D^T) / 2        D_U = rotation_up, D_V = rotation_down [r, r] zeros, c = core [r] ones

U_r, S_r, V_r^T: the top singular triplets, frozen buffers.  With E = R - I = -2 Q (I + Q)^-1

    G = diag(S (c - 1)) + E_U diag(S c) + diag(S c) E_V^T + E_U diag(S c) E_V^T

which is exactly 0 at the start and keeps its digits for small rotations, where the difference of
two matrices near diag(S) would lose them.  Nothing large is trained: x is not kept for backward.
"""

import torch
from torch import Tensor, nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.spectral_additive import compact


@method("spectral_rotational")
class SpectralRotational(Method):
    """r: singular directions that are turned among themselves."""

    formula = "W + U_r (R_U diag(S_r c) R_V^T - diag(S_r)) V_r^T"
    citation = "arXiv:2405.13952"
    trains = "2 r^2 + r"
    full_rank_limit = True

    r: int = 8
    dropout: float = 0.0

    def create(self, adapter: Adapter, base: Base) -> None:
        U, S, Vt = base.svd()
        square = torch.zeros(self.r, self.r, dtype=base.scale_dtype, device=base.weight.device)
        adapter.rotation_up = nn.Parameter(square.clone())
        adapter.rotation_down = nn.Parameter(square)
        adapter.core = base.scales(self.r)
        adapter.register_buffer("singular_up", compact(U[:, : self.r], base.dtype))
        adapter.register_buffer("singular_down", compact(Vt[: self.r], base.dtype))
        adapter.register_buffer("singular_values", compact(S[: self.r], S.dtype))

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        G = core_matrix(
            adapter.rotation_up, adapter.rotation_down, adapter.core, adapter.singular_values
        )
        up = adapter.singular_up
        return Factors(down=adapter.singular_down, up=up @ G.to(up.dtype))


def core_matrix(D_U: Tensor, D_V: Tensor, c: Tensor, S: Tensor) -> Tensor:
    """G [r, r] of the formula above, float32 or wider.  D_U, D_V [r, r]; c, S [r]."""
    wide = torch.promote_types(D_U.dtype, torch.float32)
    c, S = c.to(wide), S.to(wide)
    E_U, E_V = _turn(D_U.to(wide)), _turn(D_V.to(wide))
    tuned = S * c
    return (
        torch.diag(S * (c - 1))
        + E_U * tuned
        + tuned[:, None] * E_V.T
        + (E_U * tuned) @ E_V.T
    )  # fmt: skip


def _turn(D: Tensor) -> Tensor:
    """R - I = -2 (I + Q)^-1 Q for the Cayley rotation R; I + Q has an inverse for every D."""
    Q = (D - D.T) / 2
    return -2 * torch.linalg.solve(torch.eye(len(Q), dtype=Q.dtype, device=Q.device) + Q, Q)
