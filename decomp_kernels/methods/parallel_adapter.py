"""Parallel adapter (He et al. 2021, arXiv:2110.04366): a bottleneck network beside the linear.

    y = x W^T + b + s phi(x A^T) B^T        A = down [r, K]    B = up [N, r]
    A uniform as nn.Linear's weight, B zeros, so the start is exact; s = 1 by default

With phi = relu it is LoRA under the matrix pattern constraint MPC_n of arXiv:2407.05417.  Dropout
is on the branch's input, as everywhere here.
"""

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method


@method("parallel_adapter")
class ParallelAdapter(Method):
    """r: width of the bottleneck.  scale: s.  activation: relu, silu, gelu or tanh."""

    formula = "x W^T + s phi(x A^T) B^T"
    citation = "arXiv:2110.04366"
    trains = "r (N + K)"

    r: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    activation: str = "relu"

    def check_options(self) -> None:
        super().check_options()
        check_curved(self.activation)

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down, up=adapter.up, scale=self.scale, activation=self.activation
        )


def check_curved(activation: str) -> None:
    """Without a nonlinearity an adapter is LoRA with two more names for its options."""
    if activation == "identity":
        raise ValueError(
            "activation must be one of relu, silu, gelu, tanh, got 'identity'; "
            "use LoRA for a linear branch"
        )
