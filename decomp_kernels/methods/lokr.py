"""LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): a Kronecker product beside the weight.

    W' = W + s (C kron D)        s = alpha / r        N = a c,  K = b d
    C = left [a, b]        D = right [c, d], or right_up [c, r] @ right_down [r, d] where r is small
    C is zeros, or left_up of left_up [a, r] @ left_down [r, b]: the start is exact

x meets D and then C as small batched GEMMs (ops/kron.py); the product is never formed.
"""

import math

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.ops.kron import kron_linear
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("lokr")
class LoKr(Method):
    """r: rank of a decomposed factor.  alpha: the change is scaled by alpha / r.

    decompose_factor: the smaller factor of N and of K where it divides them, -1 for the divisors
    nearest to the square root.  D is decomposed where r < max(c, d) / 2; with decompose_both, so is
    C where r < max(a, b) / 2.
    """

    formula = "W + s (C kron D)"
    citation = "arXiv:2309.14859"
    trains = "a b + c d, or a b + r (c + d), or r (a + b + c + d)"
    peft_form = PeftForm(
        "LoKrConfig",
        "LOKR",
        tensors={
            "left": PeftTensor("lokr_w1.*"),
            "left_up": PeftTensor("lokr_w1_a.*"),
            "left_down": PeftTensor("lokr_w1_b.*"),
            "right": PeftTensor("lokr_w2.*"),
            "right_up": PeftTensor("lokr_w2_a.*"),
            "right_down": PeftTensor("lokr_w2_b.*"),
        },
        options={
            "r": "r",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        fixed={"rank_dropout": 0.0, "module_dropout": 0.0},
        per_layer=("r", "alpha"),
    )
    impls = ("auto", *dispatch.EVERYWHERE)

    r: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1

    def check_options(self) -> None:
        super().check_options()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(
                f"decompose_factor must be at least 1, or -1 for the square root, got "
                f"{self.decompose_factor}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def create(self, adapter: Adapter, base: Base) -> None:
        a, c = factorization(base.out_features, self.decompose_factor)
        b, d = factorization(base.in_features, self.decompose_factor)
        if self.decompose_both and self.r < max(a, b) / 2:
            adapter.left_up, adapter.left_down = base.matrix(a, self.r), base.kaiming(self.r, b)
        else:
            adapter.left = base.matrix(a, b)
        if self.r < max(c, d) / 2:
            adapter.right_up, adapter.right_down = base.kaiming(c, self.r), base.kaiming(self.r, d)
        else:
            adapter.right = base.kaiming(c, d)

    def forward(self, adapter: Adapter, base: Base, x: Tensor, training: bool) -> Tensor:
        left, right = self.pair(adapter)
        return self.apply(Factors(addend=kron_linear(x, left, right, impl=self.impl)), base, x)

    def merged(self, adapter: Adapter, base: Base) -> tuple[Tensor, Tensor | None]:
        left, right = (factor.to(base.scale_dtype) for factor in self.pair(adapter))
        weight = base.dense(base.scale_dtype) + torch.kron(left, right)
        return weight.to(base.weight.dtype), base.bias

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """(s C, D), multiplied out where they are decomposed."""
        if hasattr(adapter, "left"):
            left = adapter.left
        else:
            left = adapter.left_up @ adapter.left_down
        if hasattr(adapter, "right"):
            right = adapter.right
        else:
            right = adapter.right_up @ adapter.right_down
        return left * self.scale, right


def factorization(number: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = number, for the sizes of C and D.

    ``factor`` and its cofactor where it divides; else the most equal pair whose smaller part is at
    most ``factor``, or at most the square root for -1.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    small = max(
        d
        for d in range(1, math.isqrt(number) + 1)
        if number % d == 0 and (factor == -1 or d <= factor)
    )
    return small, number // small
