"""Linears with quantised weights: our own, and the adapted ones of it and of torchao's.

What all adapted ones share is ``DecomposedQuantized``: the base weight is a QuantizedWeight, and a
merged weight is quantised anew as the base was, with the error kept in ``requantization_error``.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.linear import Decomposed
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.quantize import quantize_weight
from decomp_kernels.ops.tiled_weight import dense, tiled
from decomp_kernels.quantized import Read, torchao_weight
from decomp_kernels.quantized_weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with a frozen nf4 or int8 W, in the dtype of x or of autocast.

    weight: a Parameter of the codes.  weight_scale: the absmax, float32 whatever the model is
    converted to.  dtype: of the weight that was quantised, or that of a later conversion.
    """

    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if not isinstance(weight.scale, Tensor):
            raise TypeError("QuantizedLinear takes a scale that is not quantised itself")
        self.out_features, self.in_features = weight.shape
        self.weight_format, self.dtype = weight.format, weight.dtype
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.register_buffer("weight_scale", weight.scale)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_format: str = "nf4", *, block_size: int | None = None
    ) -> "QuantizedLinear":
        """Of a plain nn.Linear, whose bias it keeps as it is."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be a plain nn.Linear, got {type(linear).__name__}")
        weight = quantize_weight(linear.weight, weight_format, block_size=block_size)
        return cls(weight, linear.bias).train(linear.training)

    def quantized_weight(self) -> QuantizedWeight:
        """The codes and scales, as operators take them."""
        return QuantizedWeight(
            self.weight.detach(), self.weight_scale, self.weight_format, self.dtype
        )

    def dequantize(self) -> nn.Linear:
        """A plain nn.Linear of the values that this one computes with."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = dense(self.quantized_weight(), self.dtype)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.bias = self.bias  # type: ignore[assignment]
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] of x [..., K]."""
        return decomposed_linear(x, self.quantized_weight(), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != self.weight.dtype:
            # Copied into codes, dense values would be rounded to integers without a word.
            args[-1].append(
                f"{prefix}weight must be {self.weight.dtype}, the codes of {self.weight_format}, "
                f"got {given.dtype}; load dense weights before quantize(model)"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shapes and format, for ``print``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.weight_format} of {self.dtype}"
        )


class DecomposedQuantized(Decomposed):
    """Mixed in before a module that has a quantised weight."""

    def read_weight(self) -> Read:
        """The weight, or why it cannot be used any more."""
        raise NotImplementedError

    def base_weight(self) -> QuantizedWeight:
        read = self.read_weight()
        if isinstance(read, str):
            raise RuntimeError(f"the quantised weight cannot be used any more: {read}")
        return read

    def hold_weight(self, weight: Tensor) -> None:
        self.hold_quantized(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        made = dense(self.base_weight(), wide)
        error = (made - weight.to(wide)).norm() / weight.to(wide).norm()
        self.requantization_error = float(error)

    def put_back_weight(self, held: Any) -> None:
        self.requantization_error = None
        self.put_back_quantized(held)

    def hold_quantized(self, weight: Tensor) -> None:
        """Quantise a dense [out, in] weight as the module's own was, in its place."""
        raise NotImplementedError

    def put_back_quantized(self, held: Any) -> None:
        raise NotImplementedError


class DecomposedQuantizedLinear(DecomposedQuantized, QuantizedLinear):
    def read_weight(self) -> QuantizedWeight:
        return self.quantized_weight()

    def gathered_weight(self, values: Tensor) -> QuantizedWeight:  # scales, a buffer, are whole
        return replace(self.quantized_weight(), codes=values.detach())

    def hold_quantized(self, weight: Tensor) -> None:
        now = self.base_weight()
        block = tiled(now, "auto").block if now.format == "nf4" else None
        self.put_back_quantized(quantize_weight(weight, now.format, block_size=block))

    def held_weight(self) -> QuantizedWeight:
        return self.quantized_weight()

    def put_back_quantized(self, held: QuantizedWeight) -> None:
        device = self.weight.device
        codes, scale = (tensor.to(device) for tensor in held.tensors())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = scale

    def as_base_weight(self, held: QuantizedWeight) -> QuantizedWeight:
        return held


class DecomposedTorchaoLinear(DecomposedQuantized, nn.Linear):  # type: ignore[misc]
    """An nn.Linear whose weight is an Int8Tensor of torchao."""

    def read_weight(self) -> QuantizedWeight:  # without a look at its values in each forward
        return torchao_weight(self.weight)

    def hold_quantized(self, weight: Tensor) -> None:
        from torchao.quantization import PerRow

        made = type(self.weight).from_hp(weight, granularity=PerRow())  # type: ignore[attr-defined]
        self.weight = nn.Parameter(made, requires_grad=False)

    def held_weight(self) -> nn.Parameter:
        return self.weight

    def put_back_quantized(self, held: nn.Parameter) -> None:
        self.weight = nn.Parameter(held.to(self.weight.device), requires_grad=False)

    def as_base_weight(self, held: nn.Parameter) -> QuantizedWeight:
        return torchao_weight(held)


def decomposed_quantized_class(module: nn.Module) -> type[Decomposed] | None:
    """The class that adapts a module whose class is known to be quantised."""
    if type(module) is nn.Linear:
        return DecomposedTorchaoLinear
    if type(module) is QuantizedLinear:
        return DecomposedQuantizedLinear
    if type(module).__module__.partition(".")[0] == "bitsandbytes":
        from decomp_kernels.bitsandbytes_linear import CLASSES

        return CLASSES.get(type(module))
    return None
