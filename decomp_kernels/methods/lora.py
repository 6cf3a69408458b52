"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank matrix beside the frozen weight.

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)
    A [r, K] uniform as nn.Linear's weight        B [N, r] zeros, so the start is exact

LoRA+ (arXiv:2402.12354) is a learning-rate rule: ``param_groups(model, lr, loraplus_lr_ratio=16)``.
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method


@method("lora")
class LoRA(LowRank):
    formula = "W + s B A"
    citation = "arXiv:2106.09685"
    trains = "r (N + K)"
    peft = "LoraConfig"

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down, up=adapter.up, scale=self.scale, activation=self.activation
        )
