"""The linears of bitsandbytes with adapters: Linear4bit of nf4, and Linear8bitLt.

Adapted, they compute in the dtype of x, or autocast's, whatever their compute_dtype is, and int8
inputs are not quantised.  Without an active adapter they are what bitsandbytes has.
"""

from typing import Any

import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, LinearNF4, Params4bit
from torch import Tensor

from decomp_kernels.linear import Decomposed
from decomp_kernels.quantized import Read, from_4bit, from_8bit
from decomp_kernels.quantized_linear import DecomposedQuantized
from decomp_kernels.quantized_weight import QuantizedWeight


class _Quantized4bit(DecomposedQuantized):
    weight: Any  # Params4bit

    # On CPUs with AVX512-BF16 bitsandbytes would pack the weight for inference, and round its
    # scales to bfloat16, in a forward without gradients, such as that of a disabled adapter.
    support_avx512bf16_for_cpu = property(lambda self: False)

    def read_weight(self) -> Read:
        return from_4bit(self.weight)

    def hold_quantized(self, weight: Tensor) -> None:
        old, state = self.weight, self.weight.quant_state
        codes, made = quantize_4bit(
            weight.contiguous(), blocksize=state.blocksize, compress_statistics=state.nested,
            quant_type=state.quant_type, quant_storage=old.quant_storage,
        )  # fmt: skip
        self.put_back_quantized(
            Params4bit(
                codes, quant_state=made, blocksize=state.blocksize,
                compress_statistics=state.nested, quant_type=state.quant_type,
                quant_storage=old.quant_storage, bnb_quantized=True,
            )
        )  # fmt: skip

    def held_weight(self) -> Params4bit:
        return self.weight

    def put_back_quantized(self, held: Params4bit) -> None:
        same = held.device == self.weight.device
        self.weight = held if same else held.to(self.weight.device)
        self.quant_state = self.weight.quant_state

    def as_base_weight(self, held: Params4bit) -> QuantizedWeight:
        read = from_4bit(held)
        assert isinstance(read, QuantizedWeight)
        return read


class DecomposedLinear4bit(_Quantized4bit, Linear4bit):
    pass


class DecomposedLinearNF4(_Quantized4bit, LinearNF4):
    pass


class DecomposedLinear8bitLt(DecomposedQuantized, Linear8bitLt):
    def read_weight(self) -> Read:
        return from_8bit(self)

    def hold_quantized(self, weight: Tensor) -> None:
        codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
        self.put_back_quantized(QuantizedWeight(codes, scale, "int8", torch.float32))

    def held_weight(self) -> QuantizedWeight:
        return self.base_weight()

    def put_back_quantized(self, held: QuantizedWeight) -> None:
        codes, scale = (tensor.to(self.weight.device) for tensor in held.tensors())
        self.weight = Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale
        )
        self.state.CB = self.state.SCB = None  # the next forward takes them from the parameter

    def as_base_weight(self, held: QuantizedWeight) -> QuantizedWeight:
        return held


CLASSES: dict[type, type[Decomposed]] = {
    Linear4bit: DecomposedLinear4bit,
    LinearNF4: DecomposedLinearNF4,
    Linear8bitLt: DecomposedLinear8bitLt,
}
