"""LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, arXiv:2309.14859).

    W' = W + s (B1 A1) * (B2 A2)        s = alpha / r        * by entries, rank up to r^2
    B1, B2 [N, r]   A1, A2 [r, K]: uniform as nn.Linear's weight, A2 zeros, so the start is exact

For r up to 8 it runs as a low-rank branch of rank r^2, by the Khatri-Rao identity

    (B1 A1) * (B2 A2) = B A,  B[j, (a, b)] = B1[j, a] B2[j, b],  A[(a, b), k] = A1[a, k] A2[b, k]

and for larger r the effective weight is built.
"""

from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import DoubleHadamard, Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor

LARGEST_BRANCH = 64  # rank of a branch that still costs less than another weight


@method("loha")
class LoHa(Method):
    """r: rank of each factor.  alpha: the change is scaled by alpha / r."""

    formula = "W + s (B1 A1) * (B2 A2)"
    citation = "arXiv:2108.06098"
    trains = "2 r (N + K)"
    peft_form = PeftForm(
        "LoHaConfig",
        "LOHA",
        tensors={
            "up1": PeftTensor("hada_w1_a.*"),
            "down1": PeftTensor("hada_w1_b.*"),
            "up2": PeftTensor("hada_w2_a.*"),
            "down2": PeftTensor("hada_w2_b.*"),
        },
        options={"r": "r", "alpha": "alpha"},
        fixed={"rank_dropout": 0.0, "module_dropout": 0.0},
        per_layer=("r", "alpha"),
    )
    impls = dispatch.NOT_NATIVE

    r: int = 8
    alpha: float = 8.0

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def create(self, adapter: Adapter, base: Base) -> None:
        N, K = base.out_features, base.in_features
        adapter.up1, adapter.down1 = base.kaiming(N, self.r), base.kaiming(self.r, K)
        adapter.up2, adapter.down2 = base.kaiming(N, self.r), base.matrix(self.r, K)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        up1, down1, up2, down2 = adapter.up1, adapter.down1, adapter.up2, adapter.down2
        if self.r * self.r > LARGEST_BRANCH:
            return Factors(weight_map=DoubleHadamard(up1, down1, up2, down2, self.scale))
        return Factors(
            down=_rows(down1, down2), up=_rows(up1.T, up2.T).T.contiguous(), scale=self.scale
        )


def _rows(first: Tensor, second: Tensor) -> Tensor:
    """Row (a, b) is first[a] * second[b]; first, second [r, n], the result [r^2, n]."""
    return (first[:, None] * second).flatten(0, 1)
