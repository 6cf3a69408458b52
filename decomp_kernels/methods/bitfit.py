"""BitFit (Ben Zaken, Ravfogel, Goldberg 2021, arXiv:2106.10199): train the bias alone.

    y = x W^T + b'        b' [N] starts as the layer's bias, or zeros where it has none

The base layer's own bias stays as it is, so that the base model can be had back.
"""

from torch import nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method


@method("bitfit")
class BitFit(Method):
    formula = "W, bias trained"
    citation = "arXiv:2106.10199"
    trains = "N"
    peft = 'LoraConfig(bias="all") trains biases beside LoRA; no class of its own'

    def create(self, adapter: Adapter, base: Base) -> None:
        if base.bias is None:
            adapter.bias = base.scales(base.out_features, fill=0.0)
        else:
            adapter.bias = nn.Parameter(base.bias.detach().to(base.scale_dtype, copy=True))

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(bias=adapter.bias)
