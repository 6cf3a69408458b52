"""PiSSA (Meng, Wang, Zhang 2024, arXiv:2404.02948): train the principal singular directions.

    W' = W_res + s B A,  W_res = W - s B0 A0   is computed as   W' = W + s (B A - B0 A0)
    B0 = U_r diag(sqrt(S_r / s)) [N, r]    A0 = diag(sqrt(S_r / s)) Vt_r [r, K]    s = alpha / r
    A = down and B = up start as A0 and B0, the buffers down0 and up0

The residual form would store W_res in the base's dtype: in bf16 that rounds every weight anew,
and a disabled, removed or second adapter would meet W_res where W is meant.  Here W is never
touched.  Both terms are one branch of rank 2r, down = [A; A0], up = [B, -B0]: at the start they
cancel whatever the dtype, and dropout and activation act on both, so the start is exact under
these too (published: on B A alone).
"""

import torch
from torch import Tensor, nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method

# Directions that the randomised SVD looks at beyond r (Halko, Martinsson, Tropp 2011: 5 to 10).
_OVERSAMPLING = 8


class SingularStart(LowRank):
    """A and B start as some of the weight's singular triplets, which leave the weight's share."""

    full_rank_limit = True

    def triplets(self, base: Base) -> tuple[Tensor, Tensor, Tensor]:
        """U [N, r], S [r], Vt [r, K]: the directions that are trained."""
        raise NotImplementedError

    def check_options(self) -> None:
        super().check_options()
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive: B0 and A0 hold 1/s, got {self.alpha}")

    def create(self, adapter: Adapter, base: Base) -> None:
        U, S, Vt = self.triplets(base)
        root = (S / self.scale).sqrt()
        down0 = (root[:, None] * Vt).to(base.dtype).contiguous()
        up0 = (U * root).to(base.dtype).contiguous()
        adapter.down, adapter.up = nn.Parameter(down0.clone()), nn.Parameter(up0.clone())
        adapter.register_buffer("down0", down0)
        adapter.register_buffer("up0", up0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=torch.cat((adapter.down, adapter.down0)),
            up=torch.cat((adapter.up, -adapter.up0), 1),
            scale=self.scale,
            activation=self.activation,
        )


@method("pissa")
class PiSSA(SingularStart):
    """niter: power iterations of a randomised SVD, much faster than the full one; None is full."""

    formula = "W + s (B A - B0 A0)"
    citation = "arXiv:2404.02948"
    trains = "r (N + K)"
    peft = 'LoraConfig(init_lora_weights="pissa")'

    niter: int | None = None

    def check_options(self) -> None:
        super().check_options()
        if self.niter is not None and self.niter < 0:
            raise ValueError(f"niter must be at least 0, or None, got {self.niter}")

    def triplets(self, base: Base) -> tuple[Tensor, Tensor, Tensor]:
        if self.niter is None:
            U, S, Vt = base.svd()
        else:
            weight = base.finite_weight()
            sampled = min(self.r + _OVERSAMPLING, *weight.shape)
            U, S, V = torch.svd_lowrank(weight, q=sampled, niter=self.niter)
            Vt = V.T
        return U[:, : self.r], S[: self.r], Vt[: self.r]
