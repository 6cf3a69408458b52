"""LoRA (Hu et al. 2021, arXiv:2106.09685): a low-rank matrix beside the frozen weight.

    W' = W + s B A        s = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)
    A [r, K] uniform as nn.Linear's weight        B [N, r] zeros, so the start is exact

LoRA+ (arXiv:2402.12354) is a learning-rate rule: ``param_groups(model, lr, loraplus_lr_ratio=16)``.
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method
from decomp_kernels.peft_form import PeftForm, PeftTensor

LORA_TENSORS = {"down": PeftTensor("lora_A.*.weight"), "up": PeftTensor("lora_B.*.weight")}
LORA_OPTIONS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "use_rslora": "use_rslora",
}


@method("lora")
class LoRA(LowRank):
    """lora_bias: a trained bias on B, y = ... + s c, with c = up_bias [N] zeros at the start."""

    formula = "W + s B A"
    citation = "arXiv:2106.09685"
    trains = "r (N + K)"
    peft_form = PeftForm(
        "LoraConfig",
        "LORA",
        tensors=LORA_TENSORS | {"up_bias": PeftTensor("lora_B.*.bias")},
        options=LORA_OPTIONS | {"lora_bias": "lora_bias"},
        fixed={"use_dora": False},
        per_layer=("r", "alpha"),
        bias_only="lora_only",
        conv1d=True,
    )

    lora_bias: bool = False

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)
        if self.lora_bias:
            adapter.up_bias = base.matrix(base.out_features)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        bias = None
        if self.lora_bias:
            bias = self.scale * adapter.up_bias.to(base.scale_dtype)
            bias = bias if base.bias is None else base.bias + bias
        return Factors(
            down=adapter.down,
            up=adapter.up,
            scale=self.scale,
            activation=self.activation,
            bias=bias,
        )
