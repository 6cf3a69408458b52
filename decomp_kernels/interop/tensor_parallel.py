"""Tensor parallel: styles for ``parallelize_module`` that split an adapted linear as a whole.

    columns    y_j = x W_j^T       W, up, out_scale, magnitude, bias split along N; x whole on each
    rows       y = sum_j x_j W_j^T   W, down, in_scale split along K, and x along its last dimension

Each rank runs the fused operator on its shards.  What is not split is replicated; its gradient is
the sum of the ranks' parts, and that of a split tensor is its own: DTensor does the collectives.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from decomp_kernels.linear import Decomposed, DecomposedLinear
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.quantized import is_quantized

# The dimension that a tensor is split along, by its name; the others are replicated.
COLUMNS = {"weight": 0, "bias": 0, "up": 0, "up_bias": 0, "out_scale": 0, "magnitude": 0}
ROWS = {"weight": 1, "down": 1, "in_scale": 0}
METHODS = ("dora", "ia3", "lora", "ssb", "ssl")  # their tensors are those, with no other meaning


class _Decomposed:
    """What both styles add to PyTorch's: adapted linears, split along ``split``."""

    split: ClassVar[dict[str, int]]
    src_data_rank: int | None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_dense(module)
        return super()._apply(module, device_mesh)  # type: ignore[misc]

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, Decomposed):
            _check_methods(module)
            if self.split is ROWS:
                _check_sum(module)
            _distribute(module, self.split, device_mesh, self.src_data_rank)
        elif name == "":
            super()._partition_linear_fn(name, module, device_mesh)  # type: ignore[misc]


class ColwiseDecomposed(_Decomposed, ColwiseParallel):
    """ColwiseParallel for adapted linears too; options as there.  Methods: see METHODS."""

    split = COLUMNS


class RowwiseDecomposed(_Decomposed, RowwiseParallel):
    """RowwiseParallel for adapted linears too; options as there.

    Methods: see METHODS, but not DoRA, whose row norms go over all ranks' columns, and no branch
    with an activation, which is no sum of the ranks' parts.
    """

    split = ROWS


class ShardedAdapter(Adapter):
    """An adapter of which this rank has shards, called with x and the base as DTensors."""

    def forward(self, base: Base, x: Tensor, training: bool) -> Tensor:
        """y, split along its last dimension by columns, a sum still to be made by rows."""
        weight: Any = base.weight
        mesh = weight.device_mesh
        by_columns = weight.placements[0].is_shard(0)
        adds_bias = by_columns or mesh.get_local_rank() == 0
        here: Any = _Here(self, adds_bias)
        bias = None if base.bias is None else _bias(_local(base.bias), adds_bias)
        base = base._replace(weight=_local(weight), bias=bias)
        y = self.method.forward(here, base, _local(x), training).contiguous()
        if not by_columns:
            return DTensor.from_local(y, mesh, [Partial()], run_check=False)
        shape = torch.Size((*y.shape[:-1], weight.shape[0]))
        stride = y.new_empty(shape, device="meta").stride()
        return DTensor.from_local(
            y, mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride
        )


class _Here:
    """An adapter as its method sees it on this rank: local tensors, everything else its own."""

    def __init__(self, adapter: Adapter, adds_bias: bool) -> None:
        self.__dict__.update(_adapter=adapter, _adds_bias=adds_bias)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._adapter, name)
        if not isinstance(value, DTensor):
            return value
        return _bias(_local(value), self._adds_bias) if name == "up_bias" else _local(value)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._adapter, name, value)


def _bias(local: Tensor, added: bool) -> Tensor:
    """One rank adds it to the sum.  Times 0 on the others: their gradients take part as zeros."""
    return local if added else local * 0


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, with a gradient that is summed over the ranks where it is replicated."""
    sharded: Any = tensor
    if not tensor.requires_grad:
        return sharded.to_local()
    own = sharded.placements
    parts = [Partial() if placement.is_replicate() else placement for placement in own]
    return sharded.redistribute(placements=own).to_local(grad_placements=parts)


def _check_dense(module: nn.Module) -> None:
    if is_quantized(module):
        raise ValueError(
            f"{type(module).__name__} has a quantised weight, which tensor parallel cannot split; "
            "leave this layer out of the plan, or load it dense"
        )


def _check_methods(layer: Decomposed) -> None:
    if not isinstance(layer, DecomposedLinear):
        raise ValueError(
            f"tensor parallel splits adapted nn.Linear layers, got a {type(layer).__name__}; leave "
            "it out of the plan"
        )
    for name, adapter in layer.adapters.items():
        method: Any = adapter.method
        if method.name not in METHODS:
            raise ValueError(
                f"tensor parallel splits adapters of {', '.join(METHODS)}, and {name!r} is "
                f"{method.name}; leave this layer out of the plan, or out of adapt"
            )
    if layer.merged_adapter is not None:
        raise RuntimeError(f"adapter {layer.merged_adapter!r} is merged; call unmerge first")


def _check_sum(layer: Decomposed) -> None:
    for name, adapter in layer.adapters.items():
        method: Any = adapter.method
        if method.name == "dora":
            raise ValueError(
                f"adapter {name!r} is DoRA, whose row norms go over the columns of all ranks; "
                "split this layer by columns (ColwiseDecomposed), or give it another method"
            )
        if getattr(method, "activation", "identity") != "identity":
            raise ValueError(
                f"adapter {name!r} has a {method.activation} in its branch, which cannot be summed "
                "over ranks; split this layer by columns (ColwiseDecomposed)"
            )


def _distribute(
    layer: Any, split: dict[str, int], mesh: DeviceMesh, src_data_rank: int | None
) -> None:
    for owner in (layer, *layer.adapters.values()):
        for name, tensor in list(owner._parameters.items()):
            if tensor is not None:
                place: Placement = Shard(split[name]) if name in split else Replicate()
                sharded = distribute_tensor(tensor, mesh, [place], src_data_rank=src_data_rank)
                owner._parameters[name] = nn.Parameter(sharded, requires_grad=tensor.requires_grad)
    for adapter in layer.adapters.values():
        adapter.__class__ = ShardedAdapter
    layer._refresh()
