"""The quantised weights of other libraries' modules, and ours, as QuantizedWeight.

    bitsandbytes    Linear4bit of quant_type "nf4", also with double quantisation; Linear8bitLt
    torchao         nn.Linear whose weight is an Int8Tensor: weight-only, symmetric, by rows
    decomp_kernels  QuantizedLinear

Nothing is copied but small scales, and no library is imported: modules are known by their class.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from decomp_kernels.quantized_weight import NESTED_BLOCK, NestedScale, QuantizedWeight

Read = QuantizedWeight | str  # a weight, or why it cannot be one
LOST = (
    "its weight is no parameter of bitsandbytes any more, and its scales are lost; fully_shard "
    "does this: use decomp_kernels.quantize for FSDP2, or DistributedDataParallel instead"
)


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The module's quantised weight; None where it has none, or one that ``why_not_quantized``."""
    read = _read(module)
    return read if isinstance(read, QuantizedWeight) else None


def why_not_quantized(module: nn.Module) -> str | None:
    """Why the module's weight, quantised by a library that is known, cannot be used."""
    read = _read(module)
    return read if isinstance(read, str) else None


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is of a class whose weight is quantised, one that can be used or not."""
    weight = module._parameters.get("weight")
    return _reader(type(module)) is not None or is_torchao(weight)  # type: ignore[arg-type]


def _read(module: nn.Module) -> Read | None:
    reader = _reader(type(module))  # type: ignore[arg-type]
    if reader is not None:
        return reader(module)
    weight = module._parameters.get("weight")
    return from_torchao(module) if is_torchao(weight) else None


@cache
def _reader(cls: type) -> Callable[[Any], Read] | None:
    for base in cls.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _READERS and base.__name__ in _READERS[package]:
            return _READERS[package][base.__name__]
    return None


def is_torchao(weight: object) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def from_4bit(weight: Any) -> Read:
    """Of a Params4bit."""
    if not hasattr(weight, "quant_state"):
        return LOST
    state = weight.quant_state
    if state is None:
        return "its weight is not quantised yet: move the model to its device first"
    if state.quant_type != "nf4":
        return (
            f"its quant_type is {state.quant_type}; only nf4 is supported: load the model with "
            'bnb_4bit_quant_type="nf4"'
        )
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes has packed its weight for inference on this CPU, which rounds its scales "
            "to bfloat16: load the model again, and adapt it before its first forward"
        )
    N, K = state.shape
    if K % 2:
        return f"its in_features are odd, {K}: its rows begin within a byte"
    scale = state.absmax
    if state.nested:
        inner = state.state2
        if inner.blocksize != NESTED_BLOCK:
            return f"its scales are quantised in blocks of {inner.blocksize}, not {NESTED_BLOCK}"
        scale = NestedScale(scale, inner.code, inner.absmax, state.offset)
    with torch._C.DisableTorchFunctionSubclass():  # plain tensors come of this one
        codes = weight.detach().view(torch.uint8).view(N, K // 2)
    return QuantizedWeight(codes, scale, "nf4", state.dtype)


def from_8bit(module: Any) -> Read:
    if module.state.has_fp16_weights:
        return "it has has_fp16_weights=True: its weight is quantised anew in each forward"
    weight = module.weight
    if not hasattr(weight, "CB"):
        return LOST
    held = weight if weight.CB is not None else module.state  # where a first forward puts them
    if held.CB is None or held.SCB is None:
        return "its weight is not quantised yet: move the model to its device first"
    # What the weight was is not kept.
    return QuantizedWeight(held.CB, held.SCB, "int8", torch.float32)


def from_torchao(module: Any) -> Read:
    weight = module.weight
    kind = type(weight).__name__
    if kind != "Int8Tensor":
        return (
            f"its weight is torchao's {kind}; only Int8Tensor (Int8WeightOnlyConfig) is supported"
        )
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return "torchao quantises its input too; only Int8WeightOnlyConfig is supported"
    if list(weight.block_size) != [1, weight.shape[1]]:
        return f"its scales are for blocks of {list(weight.block_size)}; only PerRow is supported"
    if weight.zero_point is not None and bool(weight.zero_point.any()):
        return "its quantisation is asymmetric; only a zero point of 0 is supported"
    return torchao_weight(weight)


def torchao_weight(weight: Any) -> QuantizedWeight:
    """Of an Int8Tensor by rows without zero points."""
    scale = weight.scale.flatten().float() * 127  # theirs is of one step
    return QuantizedWeight(weight.qdata, scale, "int8", weight.dtype)


_READERS: dict[str, dict[str, Callable[[Any], Read]]] = {
    "bitsandbytes": {
        "Linear4bit": lambda module: from_4bit(module.weight),
        "Linear8bitLt": from_8bit,
    },
    "decomp_kernels": {"QuantizedLinear": lambda module: module.quantized_weight()},
}
