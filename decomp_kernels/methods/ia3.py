"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): scale each output feature.

W' = diag(l) W        y = l * (x W^T) + b, or l * (x W^T + b) with scale_bias (PEFT's form)
l = out_scale [N], ones at the start
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("ia3")
class IA3(Method):
    """scale_bias: the bias is inside the scale, as in PEFT; else outside, as arXiv:2407.05417."""

    formula = "diag(l) W"
    citation = "arXiv:2205.05638"
    trains = "N"
    peft_form = PeftForm(
        "IA3Config",
        "IA3",
        tensors={"out_scale": PeftTensor("ia3_l.*", "column")},
        ours={"scale_bias": True},
        bias_needs_ours=True,
        conv1d=True,
        note="with scale_bias=True",
    )

    scale_bias: bool = False

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.out_scale = base.scales(base.out_features)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        bias = None
        if self.scale_bias and base.bias is not None:
            bias = adapter.out_scale * base.bias
        return Factors(out_scale=adapter.out_scale, bias=bias)
