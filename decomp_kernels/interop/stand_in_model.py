"""A model of nothing but the linears that an adapter is described for, without their values.

Its weights are NaN, one number in memory each: what depends on the base's values comes out NaN and
is refused, and never comes out wrong.
"""

from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop.description import Description, layer_key
from decomp_kernels.interop.fingerprint import BaseRecord


def stand_in_model(description: Description, tensors: dict[str, Tensor]) -> nn.Module:
    """Raises ValueError where the description does not say what linears there were."""
    model = nn.Module()
    for path, (_, record) in description.layers.items():
        if not path:
            raise ValueError("the adapter is of a model that is one linear itself: give it")
        known = record or _read_off(path, tensors)
        *parents, last = path.split(".")
        parent = model
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, _linear(known))
    return model


def _read_off(path: str, tensors: dict[str, Tensor]) -> BaseRecord:
    """The linear under up [N, r] and down [r, K], whose names end in a number where there are two.

    Whether it had a bias is not known, and no method whose update is a product of two reads it.
    """
    own = layer_key(path, "")
    named = {
        key.removeprefix(own).rstrip("0123456789"): tensor
        for key, tensor in tensors.items()
        if key.startswith(own) and tensor.dim() == 2
    }
    if not {"up", "down"} <= named.keys():
        raise ValueError(
            f"the shape of {path} cannot be told from the adapter alone: give the base model"
        )
    up, down = named["up"], named["down"]
    dtype = str(torch.promote_types(up.dtype, down.dtype)).removeprefix("torch.")
    return BaseRecord("Linear", (up.shape[0], down.shape[1]), dtype, False, None)


def _linear(record: BaseRecord) -> nn.Module:
    N, K = record.shape
    nan = torch.full((), torch.nan, dtype=getattr(torch, record.dtype))
    made: Any
    if record.module == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(0, 0)
        made.nf, made.nx = N, K
        made.weight = nn.Parameter(nan.expand(K, N), requires_grad=False)
    else:
        made = nn.Linear(K, N, device="meta", bias=False)
        made.weight = nn.Parameter(nan.expand(N, K), requires_grad=False)
    bias = nn.Parameter(nan.expand(N), requires_grad=False) if record.bias else None
    made.register_parameter("bias", bias)
    return made
