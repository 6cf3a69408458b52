"""The weight of the base GEMM: how W, its scales and its map travel through one call.

A Function takes tensors and a tuple of plain options; of these the weight is made again in forward
and in backward.  It is a tensor, or of a quantised W a TiledWeight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from decomp_kernels.factors import WeightMap
from decomp_kernels.ops.map_ops import MAP_OPS
from decomp_kernels.ops.tiled_weight import TiledWeight
from decomp_kernels.quantized_weight import absmax, scale_of


class Options(NamedTuple):
    """What the Function needs beside its tensors."""

    scale: float
    dropout: float
    activation: str
    save_output: bool
    compute: torch.dtype | None  # autocast's dtype, else None
    weight_format: str
    scales: int  # how many tensors the scale of a quantised weight has
    map_kind: type[WeightMap] | None
    map_names: tuple[str, ...]  # the map's tensors, in the order in which they are passed
    map_scale: float | None
    impl: str
    differentiated: bool  # grad mode outside, which a Function's forward does not see


def made_map(options: Options, mapped: tuple[Tensor, ...]) -> WeightMap:
    assert options.map_kind is not None
    scale = {} if options.map_scale is None else {"scale": options.map_scale}
    return options.map_kind(**dict(zip(options.map_names, mapped, strict=True)), **scale)


def map_op(options: Options):
    assert options.map_kind is not None
    return MAP_OPS[options.map_kind.op]


def acts_on_input(options: Options, down: Tensor | None, in_scale: Tensor | None) -> bool:
    """Whether the map can turn x, its gradients coming from g W because nothing adds to that."""
    if options.map_kind is None or down is not None or in_scale is not None:
        return False
    return map_op(options).ACTS_ON_INPUT


def effective(options: Options, weight, mapped: tuple[Tensor, ...], dtype: torch.dtype):
    """The weight of the base GEMM; a mapped one is built anew each time and never kept."""
    if options.map_kind is None:
        return weight
    m = made_map(options, mapped)
    return map_op(options).build(m, dense(weight, dtype), options.impl)


def frozen(options: Options, weight: Tensor, scales: tuple[Tensor, ...]):
    """The frozen weight: dense in autocast's dtype, or one that gives tiles of any dtype."""
    if not scales:
        return cast(weight, options.compute)
    return TiledWeight(weight, absmax(scale_of(scales)), options.weight_format, options.impl)


def as_one(weight: Tensor, weight_scale: Tensor | None, weight_format: str, impl: str):
    """The operator's three arguments as one weight."""
    if weight_scale is not None:
        return TiledWeight(weight, weight_scale, weight_format, impl)
    if weight_format != "dense":
        raise ValueError(f"weight_format must be 'dense' without a scale, got {weight_format!r}")
    return weight


def as_three(weight):
    """One weight as the operator's three arguments."""
    if isinstance(weight, Tensor):
        return weight, None, "dense"
    return weight.codes, weight.absmax, weight.format


def dense(weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def cast(t: Tensor | None, dtype: torch.dtype | None):
    return t if t is None or dtype is None else t.to(dtype)
