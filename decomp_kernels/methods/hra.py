"""HRA (Yuan, Liu, Xu 2024, arXiv:2405.17484): a product of Householder reflections of the input.

    W' = W H,  H = H_1 ... H_r,  H_i = I - 2 u_i u_i^T / ||u_i||^2        u_i = row i of down [r, K]
    compact WY:  H = I - U T U^T,  T^-1 = striu(U^T U) + diag(U^T U) / 2,  U = down^T

so it is a low-rank branch with A = U^T and B = -(W U) T: no K x K matrix, and W is read once.
Rows come in equal pairs, u_1 = u_2 and so on, whose reflections undo each other: with even r the
start is the identity, to rounding.  With odd r the last reflection stays, as it does in PEFT, and
the start is not the identity; ``identity_at_start`` of the instance says so.

apply_GS: H = I - 2 Q Q^T with Q an orthonormal basis of the rows, that is B = -2 (W U) (U^T U)^-1.
The rows are then drawn independently, and the start is not the identity for any r.
"""

import torch
from torch import Tensor, nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.ops.autocast import no_autocast
from decomp_kernels.ops.frozen_matmul import frozen_matmul
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("hra")
class HRA(Method):
    """r: number of reflections, even for an identity start.  apply_GS: orthonormal reflections."""

    formula = "W (I - U T U^T)"
    citation = "arXiv:2405.17484"
    trains = "r K"
    peft_form = PeftForm(
        "HRAConfig",
        "HRA",
        tensors={"down": PeftTensor("hra_u.*", "transposed")},
        options={"r": "r", "apply_GS": "apply_GS"},
        bias_only="hra_only",
    )

    r: int = 8
    apply_GS: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "identity_at_start", self.r % 2 == 0 and not self.apply_GS)

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        super().check_shape(out_features, in_features, name)
        if self.apply_GS and self.r > in_features:
            raise ValueError(
                f"r must be at most in_features = {in_features} of {name or 'this layer'} for "
                f"orthonormal reflections, got {self.r}; lower r or leave apply_GS=False"
            )

    def create(self, adapter: Adapter, base: Base) -> None:
        pairs, single = (0, self.r) if self.apply_GS else divmod(self.r, 2)
        rows = [base.kaiming(base.in_features, pairs).T.repeat_interleave(2, 0)] if pairs else []
        rows += [base.kaiming(base.in_features, single).T] if single else []
        adapter.down = nn.Parameter(torch.cat(rows).detach().contiguous())

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        down = adapter.down
        projected = frozen_matmul(base.weight, down.T)  # W U, [N, r]
        with no_autocast(base.weight.device):
            up = self.up(down.to(base.scale_dtype), projected.to(base.scale_dtype))
        return Factors(down=down, up=up.to(down.dtype))

    def up(self, down: Tensor, projected: Tensor) -> Tensor:
        """B [N, r] of U^T = down [r, K] and W U [N, r]."""
        gram = down @ down.T
        if self.apply_GS:
            return -2 * torch.linalg.solve(gram, projected, left=False)
        inverse_of_T = gram.triu(1) + gram.diagonal().diag_embed() / 2
        return -torch.linalg.solve_triangular(inverse_of_T, projected, upper=True, left=False)
