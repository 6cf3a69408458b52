"""The library GEMM, in the forms that every implementation uses.

``accumulate`` is out += a b with beta = 1 in place: the low-rank result is written first, and the
base GEMM then adds to it inside its own accumulator.  The read of ``out`` hides under a GEMM that
is bound by arithmetic, and the low-rank term is rounded once instead of three times.

The ``wide`` forms keep float32 precision for float32 adapters on a bf16 or fp16 base and never
convert the large operand as a whole: they walk it in row blocks that stay in cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB as float32: half of a core's level-2 cache or less on 2020s CPUs
OUTER_ELEMENTS = 1 << 20  # of dW: enough rows that its GEMM runs at the speed of an undivided one


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out [M, N] += a [M, K] @ b [K, N], in place.  ``out`` must be the caller's own buffer."""
    return out.addmm_(a, b)


def row_blocks(rows: int, cols: int, elements: int = _BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``cols`` columns, about ``elements`` elements each."""
    step = max(1, elements // max(cols, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def project(x: Tensor, small: Tensor) -> Tensor:
    """x [M, K] @ small [K, r].  In small's dtype and precision where that is wider than x's."""
    if x.dtype == small.dtype:
        return x @ small
    out = small.new_empty(x.shape[0], small.shape[1])
    for rows in row_blocks(*x.shape):
        torch.mm(x[rows].to(small.dtype), small, out=out[rows])
    return out


def expand(v: Tensor, small: Tensor, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """start + v [M, r] @ small [r, N], a new [M, N] tensor of ``dtype``; start is [N] or [M, N].

    Where ``dtype`` is narrower than the operands, each is split into a high and a low part of
    ``dtype``: the products of the parts are exact in the GEMM's float32 accumulator, and three of
    the four carry all but 2^-16 (bf16) of the value.
    """
    if v.dtype != dtype:
        v_high, v_low = _split(v, dtype)
        small_high, small_low = _split(small, dtype)
        v = torch.cat((v_high, v_low, v_high), 1)
        small = torch.cat((small_high, small_high, small_low), 0)
    return v @ small if start is None else torch.addmm(start, v, small)


def outer_blocks(
    g: Tensor, x: Tensor, elements: int = OUTER_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """dW = g^T x [N, K] of g [M, N], x [M, K] in blocks of rows, never stored whole."""
    g, x = g.contiguous(), x.contiguous()
    for rows in row_blocks(g.shape[1], x.shape[1], elements):
        yield rows, g[:, rows].T @ x


def _split(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    high = t.to(dtype)
    return high, (t - high).to(dtype)
