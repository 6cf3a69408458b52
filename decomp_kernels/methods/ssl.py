"""SSL (Si, Yang, Shen 2024, arXiv:2407.05417): scale the subspace of the left singular vectors.

    W' = W diag(in_scale)        y = (x * in_scale) W^T + b
    in_scale [K], ones at the start

The paper writes W as [in, out], so its left side is the input; here W is [N, K] = [out, in].
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("ssl")
class SSL(Method):
    formula = "W diag(s_in)"
    citation = "arXiv:2407.05417"
    trains = "K"
    peft_form = PeftForm(
        "IA3Config",
        "IA3",
        tensors={"in_scale": PeftTensor("ia3_l.*", "row")},
        layers="feedforward_modules",
        conv1d=True,
        note="the layer in feedforward_modules",
    )

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.in_scale = base.scales(base.in_features)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(in_scale=adapter.in_scale)
