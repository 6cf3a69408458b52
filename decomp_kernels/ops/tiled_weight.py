"""A quantised weight as implementations meet it: dense tiles, one after another, and none kept.

    y[:, rows] = x tile^T    over tiles of rows        dx[:, cols] = g tile    over tiles of columns

Each element of a product comes from one GEMM over the whole sum, so it is rounded once, as with a
dense weight.
"""

from collections.abc import Callable, Iterator
from math import gcd

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.ops.dequantize import check_format
from decomp_kernels.ops.dequantize import op as dequantize
from decomp_kernels.quantized_weight import QuantizedWeight, absmax, dense_shape
from decomp_kernels.reference.dequantize import block_size

TILE_ELEMENTS = 1 << 21  # docs/quantized.md has what other sizes cost


class TiledWeight:
    """codes and format: of a QuantizedWeight.  absmax: float32, of each of its blocks.

    impl: of the operator that dequantises.
    """

    requires_grad = False

    def __init__(self, codes: Tensor, absmax: Tensor, weight_format: str, impl: str) -> None:
        self.codes, self.absmax = codes, absmax
        self.format, self.impl = weight_format, impl
        self.shape = dense_shape(codes, weight_format)
        self.device = codes.device

    @property
    def block(self) -> int:
        """Consecutive elements with one absmax."""
        if self.format == "int8":
            return self.shape[1]
        size = block_size(self.numel(), self.absmax.numel())
        assert size is not None  # ``check`` has seen to that
        return size

    def numel(self) -> int:
        return self.shape.numel()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K], whole."""
        N, K = self.shape
        return self._tile(self.codes, self.absmax, N, K, dtype)

    def each_row_tile(self, dtype: torch.dtype, use: Callable[[slice, Tensor], object]) -> None:
        """use(rows, tile [n, K]) of tiles that cover the rows; of nf4 each begins with a block."""
        (N, K), block = self.shape, self.block
        for rows in slices(N, self._elements() // K, block // gcd(block, K)):
            blocks = slice(rows.start * K // block, -(-rows.stop * K // block))
            absmax = self.absmax[blocks]
            use(rows, self._tile(self.codes[rows], absmax, rows.stop - rows.start, K, dtype))

    def each_column_tile(self, dtype: torch.dtype, use: Callable[[slice, Tensor], object]) -> None:
        """use(cols, tile [N, k]) of tiles that cover the columns; one of all where the blocks of
        nf4 span rows.
        """
        (N, K), block = self.shape, self.block
        if K % block:
            use(slice(0, K), self.dense(dtype))
            return
        in_a_byte = K // self.codes.shape[1]
        scales = self.absmax.view(N, K // block)
        for cols in slices(K, self._elements() // N, block if self.format == "nf4" else 1):
            codes = self.codes[:, cols.start // in_a_byte : cols.stop // in_a_byte].contiguous()
            some = scales[:, cols.start // block : -(-cols.stop // block)].contiguous()
            use(cols, self._tile(codes, some.flatten(), N, cols.stop - cols.start, dtype))

    def _elements(self) -> int:
        return dispatch.block_elements(self.device, TILE_ELEMENTS)

    def _tile(self, codes: Tensor, absmax: Tensor, rows: int, cols: int, dtype: torch.dtype):
        return dequantize(codes, absmax, self.format, rows, cols, dtype, self.impl)


def slices(size: int, step: int, aligned: int) -> Iterator[slice]:
    """Slices that cover ``size``, of about ``step`` and from multiples of ``aligned``."""
    step = max(aligned, step // aligned * aligned)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def tiled(weight: QuantizedWeight, impl: str) -> TiledWeight:
    return TiledWeight(weight.codes, absmax(weight.scale), weight.format, impl)


def dense(weight: Tensor | QuantizedWeight, dtype: torch.dtype, impl: str = "auto") -> Tensor:
    """The weight [N, K] as a dense tensor of ``dtype``."""
    return weight.to(dtype) if isinstance(weight, Tensor) else tiled(weight, impl).dense(dtype)


def check_quantized(weight: QuantizedWeight) -> None:
    """Raise ValueError or TypeError where codes and scale do not fit each other."""
    if weight.codes.dim() != 2:
        raise ValueError(
            f"codes must be [N, K], or [N, K / 2] of nf4, got {tuple(weight.codes.shape)}"
        )
    scale = weight.scale
    if not isinstance(scale, Tensor):  # as many as there are codes of them
        scale = scale.absmax[:1].expand(scale.codes.numel())
    check_format(weight.codes, scale, weight.format, weight.shape)  # type: ignore[arg-type]
