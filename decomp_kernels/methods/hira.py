"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS): a Hadamard high-rank change.

    W' = W * (1 + B A)        * by entries
    A [r, K] uniform as nn.Linear's weight        B [N, r] zeros, so the start is exact

The rank of W * (B A) can reach r times that of W.  LieRA is the same with a scale.
"""

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors, Hadamard
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("hira")
class HiRA(Method):
    """r: rank of B A."""

    formula = "W * (1 + B A)"
    citation = "openreview TwJrTz9cRS"
    trains = "r (N + K)"
    peft_form = PeftForm(
        "HiraConfig",
        "HIRA",
        tensors={"down": PeftTensor("hira_A.*"), "up": PeftTensor("hira_B.*")},
        options={"r": "r"},
        fixed={"hira_dropout": 0.0},
        conv1d=True,
    )
    impls = dispatch.NOT_NATIVE

    r: int = 32

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(weight_map=Hadamard(adapter.up, adapter.down))
