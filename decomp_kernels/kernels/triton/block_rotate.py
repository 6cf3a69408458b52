"""x R, W R^T and the gradients of the blocks of R (maths: reference/block_rotate.py).

    out = t R_j, or t R_j^T with transposed blocks       t, out [M, K]
    d_blocks_i = (left P_j)_i^T (right P_j)_i            left, right [M, K]

One launch is one factor.  A tile takes BLOCK_C columns in the factor's order: as many whole blocks
as fit, as one block-diagonal matrix, or BLOCK_C columns of a larger block.  Columns are gathered at
the load and scattered at the store.  Between factors rows are float32, a few thousand at a time, so
that they stay in the level-2 cache.  A program of the gradient owns a share of the rows; the
partials are added in a fixed order.

    blocks: (q, b, b) of any strides, q b = K    order: (K,) int64 or None
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels import gemm
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot_for, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.kernels.triton.weight_tile import shares_of

# Of rows between two factors: 16 MiB as float32, so that what one launch writes and the next reads
# is in a level-2 cache of 40 MiB (A100) or more.
ELEMENTS = 1 << 22


@triton.jit
def _columns(start, group, width, K, order_ptr, BLOCK_C: tl.constexpr):
    """(positions in the factor's order, columns of the tensor, which exist) of one tile."""
    inner = start + tl.arange(0, BLOCK_C)
    position = group * width + inner
    exists = (inner < width) & (position < K)
    column = position.to(tl.int64)
    if order_ptr is not None:
        column = tl.load(order_ptr + position, mask=exists, other=0)
    return position, column, exists


@triton.jit
def _product_of(a, b, acc, NARROW: tl.constexpr):
    """acc + a @ b; where NARROW, operands of two dtypes as float32 in parts (pieces.dot_for)."""
    if NARROW and a.dtype != b.dtype:
        acc = dot_for(a.to(tl.float32), b.to(tl.float32), acc, True)
    else:
        acc = dot_for(a, b, acc, NARROW)
    return acc


@triton.jit
def _rotate_kernel(
    t_ptr, blocks_ptr, order_ptr, out_ptr,
    M, K, width, size, stride_row, stride_col, stride_block, stride_from, stride_to,
    NARROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    parts = tl.cdiv(width, BLOCK_C)
    group = tl.program_id(1) // parts
    start_to = (tl.program_id(1) % parts) * BLOCK_C
    to, to_column, in_to = _columns(start_to, group, width, K, order_ptr, BLOCK_C)
    turned = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, width, BLOCK_C):
        taken, taken_column, in_taken = _columns(start, group, width, K, order_ptr, BLOCK_C)
        t = tl.load(
            t_ptr + rows[:, None] * stride_row + taken_column[None, :] * stride_col,
            mask=in_rows[:, None] & in_taken[None, :], other=0.0,
        )  # fmt: skip
        block = (taken // size).to(tl.int64) * stride_block + (taken % size) * stride_from
        same = (taken // size)[:, None] == (to // size)[None, :]
        blocks = tl.load(
            blocks_ptr + block[:, None] + ((to % size) * stride_to)[None, :],
            mask=same & in_taken[:, None] & in_to[None, :], other=0.0,
        )  # fmt: skip
        turned = _product_of(t, blocks, turned, NARROW)
    tl.store(
        out_ptr + rows[:, None] * K + to_column[None, :], narrow(turned, out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & in_to[None, :],
    )  # fmt: skip


@triton.jit
def _gradient_kernel(
    left_ptr, right_ptr, order_ptr, partial_ptr,
    M, K, width, size, m_share, stride_left, stride_right,
    NARROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(1)
    parts = tl.cdiv(width, BLOCK_C)
    group, part = tl.program_id(0) // (parts * parts), tl.program_id(0) % (parts * parts)
    start, start_to = (part // parts) * BLOCK_C, (part % parts) * BLOCK_C
    taken, taken_column, in_taken = _columns(start, group, width, K, order_ptr, BLOCK_C)
    to, to_column, in_to = _columns(start_to, group, width, K, order_ptr, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for first in range(share * m_share, min((share + 1) * m_share, M), BLOCK_M):
        rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = rows < M
        left = tl.load(
            left_ptr + rows[None, :] * stride_left + taken_column[:, None],
            mask=in_taken[:, None] & in_rows[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + rows[:, None] * stride_right + to_column[None, :],
            mask=in_rows[:, None] & in_to[None, :], other=0.0,
        )  # fmt: skip
        total = _product_of(left, right, total, NARROW)
    same = (taken // size)[:, None] == (to // size)[None, :]
    tl.store(
        partial_ptr + (share.to(tl.int64) * K + taken[:, None]) * size + (to % size)[None, :],
        total, mask=same & in_taken[:, None] & in_to[None, :],
    )  # fmt: skip


def build(m: BlockRotate, weight: Tensor) -> Tensor:
    return _product(m, weight, transposed=True)


def forward(m: BlockRotate, x: Tensor) -> Tensor:
    """x R of x [M, K]."""
    return _product(m, x, transposed=False)


def contract(m: BlockRotate, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    return backward(m, g @ weight, x)[0]


def backward(m: BlockRotate, gx: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d_blocks, dx) of gx = g W [M, K] and x [M, K]."""
    gx, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (gx, x))
    d_blocks = torch.zeros(m.blocks.shape, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(gx, memory_format=torch.contiguous_format)
    count = m.blocks.shape[0]
    for rows in _row_blocks(m, x):
        inputs = [x[rows]]
        for j in range(count - 1):
            inputs.append(_rotated(inputs[j], m, j))
        turned = gx[rows]
        for j in reversed(range(count)):
            d_blocks[j] += _gradient(inputs[j], turned, m, j)
            out = dx[rows] if j == 0 else None
            turned = _rotated(turned, m, j, transposed=True, out=out)
    return d_blocks.to(m.blocks.dtype), dx


def _product(m: BlockRotate, t: Tensor, transposed: bool) -> Tensor:
    """t R, or t R^T, of t [M, K] in t's dtype: rounded once."""
    product = torch.empty_like(t, memory_format=torch.contiguous_format)
    factors = list(range(m.blocks.shape[0]))
    for rows in _row_blocks(m, t):
        turned = t[rows]
        for j in reversed(factors) if transposed else factors:
            last = j == (factors[0] if transposed else factors[-1])
            out = product[rows] if last else None
            turned = _rotated(turned, m, j, transposed, out)
    return product


def _rotated(
    t: Tensor, m: BlockRotate, j: int, transposed: bool = False, out: Tensor | None = None
) -> Tensor:
    """t R_j, or t R_j^T, in ``out`` or float32, which is exact to that where the blocks are."""
    (M, K), size = t.shape, m.blocks.shape[-1]
    blocks = m.blocks[j].mT if transposed else m.blocks[j]
    blocks = blocks.float() if t.dtype == torch.float32 else blocks
    out = torch.empty(M, K, dtype=torch.float32, device=t.device) if out is None else out
    config = configuration("block_rotate", t.device, blocks.dtype, M=M, r=size)
    width, tasks = _groups(K, size, config["BLOCK_C"])
    _rotate_kernel[(triton.cdiv(M, config["BLOCK_M"]), tasks)](
        t, blocks, _order(m, j), out, M, K, width, size,
        t.stride(0), t.stride(1), *blocks.stride(),
        NARROW=any(dtype != torch.float32 for dtype in (out.dtype, m.blocks.dtype)),
        **tiles(config), **launch_options(config),
    )  # fmt: skip
    return out


def _gradient(left: Tensor, right: Tensor, m: BlockRotate, j: int) -> Tensor:
    """The gradient of the blocks of factor j, [q, b, b] in float32."""
    (M, K), size = left.shape, m.blocks.shape[-1]
    dtype = torch.promote_types(left.dtype, right.dtype)
    config = configuration("block_rotate", left.device, dtype, M=M, r=size)
    width, tasks = _groups(K, size, config["BLOCK_C"])
    shares, m_share = shares_of(M, config["BLOCK_M"], config["SHARES"])
    partial = torch.empty(shares, *m.blocks.shape[1:], dtype=torch.float32, device=left.device)
    _gradient_kernel[(tasks * triton.cdiv(width, config["BLOCK_C"]), shares)](
        left, right, _order(m, j), partial, M, K, width, size, m_share,
        left.stride(0), right.stride(0),
        NARROW=m.blocks.dtype != torch.float32, **tiles(config), **launch_options(config),
    )  # fmt: skip
    return partial.sum(0)


def _groups(K: int, size: int, block_c: int) -> tuple[int, int]:
    """(columns of a group: whole blocks of ``size``, tiles that all groups have together)."""
    width = max(1, block_c // size) * size
    return width, triton.cdiv(K, width) * triton.cdiv(width, block_c)


def _row_blocks(m: BlockRotate, t: Tensor) -> Iterator[slice]:
    """All rows at once where there is one factor, and nothing between factors."""
    return gemm.row_blocks(t, ELEMENTS if m.blocks.shape[0] > 1 else max(t.numel(), 1))


def _order(m: BlockRotate, j: int) -> Tensor | None:
    return None if m.permutations is None else m.permutations[j].contiguous()


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    options = launch_options(config)
    strides = ("row", "col", "block", "from", "to")
    for dtypes, (wide, adapter) in DTYPES.items():
        kinds = [("first", wide, "fp32", None), ("last", "fp32", wide, None)]
        for kind, taken, out, order in (
            *(kinds if adapter == "fp32" else []),  # between factors rows and blocks are float32
            ("permuted", wide, wide, "*i64"),
            ("in order", wide, wide, None),
        ):
            sizes = dict.fromkeys(("M", "K", "width", "size"), "i32")
            constants: dict[str, Any] = tiles(config) | ({} if order else {"order_ptr": None})
            if order:
                sizes["order_ptr"] = order
            types = {
                "t_ptr": f"*{taken}", "blocks_ptr": f"*{adapter}", "out_ptr": f"*{out}", **sizes,
                **{f"stride_{name}": "i32" for name in strides},
            }  # fmt: skip
            yield Specimen(
                f"{dtypes} rotate {kind}", _rotate_kernel, types,
                constants | {"NARROW": out != "fp32"}, options, unit=("stride_col", "stride_to"),
            )  # fmt: skip
            types = {
                "left_ptr": f"*{wide}", "right_ptr": f"*{taken}", "partial_ptr": "*fp32", **sizes,
                "m_share": "i32", "stride_left": "i32", "stride_right": "i32",
            }  # fmt: skip
            for split in sorted({adapter != "fp32", kind == "last" and wide != "fp32"}):
                name = f"{dtypes} gradient {kind}{' split' if split else ''}"
                yield Specimen(
                    name, _gradient_kernel, types, constants | {"NARROW": split}, options
                )
