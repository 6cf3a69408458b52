"""The library GEMM, in the forms that every implementation uses.

``accumulate`` is out += a b with beta = 1 in place: the low-rank result is written first, and the
base GEMM then adds to it inside its own accumulator.  The read of ``out`` hides under a GEMM that
is bound by arithmetic, and the low-rank term is rounded once instead of three times.

The ``wide`` forms keep float32 precision for float32 adapters on a bf16 or fp16 base and never
convert the large operand as a whole: they walk it in row blocks that stay in cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels import dispatch

_BLOCK_ELEMENTS = 1 << 18  # 1 MiB as float32: half of a core's level-2 cache or less on 2020s CPUs
_STORE_ELEMENTS = 1 << 16  # of a product that is rounded as it is stored: 256 KiB as float32
OUTER_ELEMENTS = 1 << 20  # of dW: enough rows that its GEMM runs at the speed of an undivided one


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out [M, N] += a [M, K] @ b [K, N], in place.  ``out`` must be the caller's own buffer."""
    return out.addmm_(a, b)


def by_weight_t(x: Tensor, weight: Any, start: Tensor | None) -> Tensor:
    """start + x [M, K] @ weight^T, [M, N].  start: [N], or the caller's own [M, N].

    weight [N, K] is a tensor, or gives its tiles in the dtype asked for (ops/tiled_weight.py).
    """
    if isinstance(weight, Tensor):
        if start is None or start.dim() == 1:
            return F.linear(x, weight, start)
        return accumulate(start, x, weight.T)
    if start is not None and start.dim() == 2:
        weight.each_row_tile(x.dtype, lambda rows, W: accumulate(start[:, rows], x, W.T))
        return start
    out = x.new_empty(x.shape[0], weight.shape[0])
    if start is None:
        weight.each_row_tile(x.dtype, lambda rows, W: torch.mm(x, W.T, out=out[:, rows]))
    else:
        weight.each_row_tile(
            x.dtype, lambda rows, W: torch.addmm(start[rows], x, W.T, out=out[:, rows])
        )
    return out


def by_weight(g: Tensor, weight: Any, start: Tensor | None) -> Tensor:
    """start + g [M, N] @ weight, [M, K].  start: the caller's own [M, K].  weight: as above."""
    if isinstance(weight, Tensor):
        return g @ weight if start is None else accumulate(start, g, weight)
    if start is not None:
        weight.each_column_tile(g.dtype, lambda cols, W: accumulate(start[:, cols], g, W))
        return start
    out = g.new_empty(g.shape[0], weight.shape[1])
    weight.each_column_tile(g.dtype, lambda cols, W: torch.mm(g, W, out=out[:, cols]))
    return out


def row_blocks(
    of: Tensor, elements: int = _BLOCK_ELEMENTS, cols: int | None = None
) -> Iterator[slice]:
    """Slices that cover the rows of ``of``, about ``elements`` elements of ``cols`` columns each.

    cols: those of ``of`` where it is None.  On a GPU, where a block is a launch, they are larger.
    """
    rows, width = of.shape[0], max(of.shape[-1] if cols is None else cols, 1)
    step = max(1, dispatch.block_elements(of.device, elements) // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def project(x: Tensor, small: Tensor) -> Tensor:
    """x [M, K] @ small [K, r].  In small's dtype and precision where that is wider than x's."""
    if x.dtype == small.dtype:
        return skinny(x, small)
    out = small.new_empty(x.shape[0], small.shape[1])
    for rows, block in converted(x, small.dtype):
        torch.mm(block, small, out=out[rows])
    return out


def skinny(x: Tensor, small: Tensor) -> Tensor:
    """x [M, K] @ small [K, r] of one dtype; as (small^T x^T)^T in 16 bits, where that is faster."""
    return (small.T @ x.T).T.contiguous() if x.element_size() == 2 else x @ small


def converted(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of x in ``dtype``, one after another in one buffer."""
    buffer = None
    for rows in row_blocks(x):
        if buffer is None:
            buffer = torch.empty(rows.stop, x.shape[1], dtype=dtype, device=x.device)
        yield rows, buffer[: rows.stop - rows.start].copy_(x[rows])


def expand(v: Tensor, small: Tensor, start: Tensor | None, dtype: torch.dtype) -> Tensor:
    """start + v [M, r] @ small [r, N], a new [M, N] tensor of ``dtype``; start is [N] or [M, N].

    Operands wider than ``dtype`` are multiplied as they are, block by block, and rounded once.
    """
    if v.dtype == dtype:
        return v @ small if start is None else torch.addmm(start, v, small)
    out = torch.empty(v.shape[0], small.shape[1], dtype=dtype, device=v.device)
    buffer = None
    for rows in row_blocks(out, _STORE_ELEMENTS):
        if buffer is None:
            buffer = v.new_empty(rows.stop, small.shape[1])
        block = buffer[: rows.stop - rows.start]
        if start is None:
            torch.mm(v[rows], small, out=block)
        else:
            first = start if start.dim() == 1 else start[rows]
            torch.addmm(first.to(v.dtype), v[rows], small, out=block)
        out[rows] = block
    return out


def outer_blocks(
    g: Tensor, x: Tensor, elements: int = OUTER_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """dW = g^T x [N, K] of g [M, N], x [M, K] in blocks of rows, never stored whole."""
    g, x = g.contiguous(), x.contiguous()
    for rows in row_blocks(g.T, elements, x.shape[1]):
        yield rows, g[:, rows].T @ x
