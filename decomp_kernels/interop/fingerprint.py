"""Which base an adapter was trained on: sha256 over the values of each adapted weight and bias.

    hash = sha256(weight[j_0], weight[j_1], ..., bias[j_0], ...)      j_i = i * 2654435761 mod N K

The step is a prime, so the j_i are distinct and go through all rows and columns.  Of a tensor with
at most 65536 elements all are taken, of a larger one 65536: milliseconds for a model of any size,
and a base of which one element in a thousand differs is told apart with certainty for practical
purposes (1 - 0.999^65536).  The bits do not depend on device or memory layout; they do on the
dtype, for bf16 weights are other numbers than the fp32 weights they were rounded from.  Of a
quantised weight the codes and the scales are taken.
"""

import ctypes
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decomp_kernels.linear import Decomposed, plain_class
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.sharding import is_sharded, whole

_SAMPLE = 65536
_STEP = 2654435761


class BaseRecord(NamedTuple):
    """What is known of the linear under an adapter."""

    module: str  # its class, Linear or Conv1D
    shape: tuple[int, int]  # of the weight, (out_features, in_features)
    dtype: str
    bias: bool
    values: str | None  # the hash; None where merging without keep_base has overwritten them


def base_record(layer: Decomposed, *, bias_is_trained: bool) -> BaseRecord:
    """A trained bias is no part of the base: it is saved, and its value left out of the hash."""
    known = unmerged_base(layer)
    weight = layer.base_weight() if known is None else known[0]
    values = None
    if known is not None:
        own = known[0]
        hashed = list(own.tensors()) if isinstance(own, QuantizedWeight) else [own]
        if known[1] is not None and not bias_is_trained:
            hashed.append(known[1])
        values = _hash(hashed)
    return BaseRecord(
        plain_class(layer).__name__,
        (weight.shape[0], weight.shape[1]),
        dtype_name(weight),
        layer.bias is not None if known is None else known[1] is not None,
        values,
    )


def dtype_name(weight: Tensor | QuantizedWeight) -> str:
    """Such as bfloat16, or nf4 of bfloat16."""
    name = str(weight.dtype).removeprefix("torch.")
    return name if isinstance(weight, Tensor) else f"{weight.format} of {name}"


def unmerged_base(layer: Decomposed) -> tuple[Tensor | QuantizedWeight, Tensor | None] | None:
    """(weight [out, in], bias) without any adapter, whole; None where they were not kept."""
    if layer.merged_adapter is None:
        sharded = is_sharded(layer.weight)
        weight = layer.gathered_weight(whole(layer.weight)) if sharded else layer.base_weight()
        return weight, None if layer.bias is None else whole(layer.bias)
    if layer.kept_base is None:
        return None
    held, bias = layer.kept_base
    weight = layer.as_base_weight(held)
    if bias is not None:
        now = layer.bias if isinstance(weight, QuantizedWeight) else weight
        bias = bias.to(now.dtype)  # type: ignore[union-attr]
    return weight, bias


def difference(saved: BaseRecord, found: BaseRecord) -> str | None:
    """How the base at hand differs from the one in the file, in words; None where it does not."""
    if saved.values is None:
        return "the file does not say what its base was: it was saved after merging for good"
    if saved.module != found.module:
        return f"it was a {saved.module} and is a {found.module}"
    if saved.dtype != found.dtype:
        return f"its weight was {saved.dtype} and is {found.dtype}"
    if saved.bias != found.bias:
        words = {True: "a bias", False: "no bias"}
        return f"it had {words[saved.bias]} and has {words[found.bias]}"
    if saved.values != found.values:
        return "its weight or bias has other values"
    return None


def raw_bytes(tensor: Tensor) -> bytes:
    """The elements of a contiguous tensor on the host, as they lie in memory."""
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


@torch.no_grad()
def _hash(tensors: list[Tensor]) -> str:
    found: Any = hashlib.sha256()
    for tensor in tensors:
        count = tensor.numel()
        if count > _SAMPLE:
            index = torch.arange(_SAMPLE, dtype=torch.int64) * _STEP % count
            if tensor.dim() == 2:
                rows, cols = index // tensor.shape[1], index % tensor.shape[1]
                tensor = tensor[rows.to(tensor.device), cols.to(tensor.device)]
            else:
                tensor = tensor[index.to(tensor.device)]
        found.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()
