"""DecomposedConv1D: GPT-2's Conv1D, y = x weight + bias with weight [in, out], with adapters."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from decomp_kernels.linear import Decomposed


class DecomposedConv1D(Decomposed, Conv1D):
    def base_weight(self) -> Tensor:
        return self.weight.T

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()
