"""What the fused kernels share: one tile of  (a * a_scale) b + scale * v small  in registers.

A fused kernel's programs are few, and each takes tile after tile.  The operands of the base
product come in one of two forms: pointers with masks, for any shape and stride, or tensor
descriptors, which the copy engine of sm_90 and later reads (TMA) and which need bases and row
strides that are multiples of 16 bytes.  Operands of the rank-r product are pointers.

    a: (M, I)    b: (I, C), or (C, I) where TRANSPOSED    a_scale: (I,) or None
    v: (M, r)    small: (r, C), or (C, r) where TRANSPOSED, both with r or C as row stride
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from decomp_kernels import dispatch
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, dot_for, narrow
from decomp_kernels.kernels.triton.specimens import tiles

# Older compilers stop at a warp-specialised loop over tiles on sm_100 and sm_120.
_CAN_SPECIALISE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@triton.jit
def tile_place(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(row, column) of a tile.  GROUP rows of tiles go together: they share what is cached."""
    first = tile // (GROUP * col_tiles) * GROUP
    within = tile % (GROUP * col_tiles)
    rows = min(row_tiles - first, GROUP)
    return first + within % rows, within // rows


@triton.jit
def read_tile(
    source, first_row, first_col, rows, cols, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of source [rows, cols] from (first_row, first_col); zeros outside."""
    if DESCRIPTOR:
        tile = source.load([first_row, first_col])
    else:
        row = first_row + tl.arange(0, ROWS)
        col = first_col + tl.arange(0, COLS)
        tile = tl.load(
            source + row[:, None].to(tl.int64) * stride + col[None, :],
            mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0,
        )  # fmt: skip
    return tile


@triton.jit
def base_product(
    a, b, a_scale_ptr, acc, first_row, first_col, M, C, inner, stride_a, stride_b,
    TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc + (a * a_scale) @ b, with a * a_scale rounded to a's dtype as the composition does."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_C: tl.constexpr = acc.shape[1]
    for start in range(0, inner, BLOCK):
        left = read_tile(
            a, first_row, start, M, inner, stride_a, BLOCK_M, BLOCK, DESCRIPTORS
        )  # fmt: skip
        if a_scale_ptr is not None:
            cols = start + tl.arange(0, BLOCK)
            scale = tl.load(a_scale_ptr + cols, mask=cols < inner, other=0.0).to(tl.float32)
            left = narrow(left.to(tl.float32) * scale[None, :], left.dtype)
        if TRANSPOSED:
            right = read_tile(
                b, first_col, start, C, inner, stride_b, BLOCK_C, BLOCK, DESCRIPTORS
            ).T  # fmt: skip
        else:
            right = read_tile(
                b, start, first_col, inner, C, stride_b, BLOCK, BLOCK_C, DESCRIPTORS
            )  # fmt: skip
        acc = dot(left, right, acc)
    return acc


@triton.jit
def rank_product(
    v_ptr, small_ptr, scale, acc, first_row, first_col, M, C, R,
    TRANSPOSED: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """acc + (scale * v) @ small, with scale * v rounded to v's dtype; any r.

    NARROW: the sum is rounded to bf16 or fp16 in the end.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_C: tl.constexpr = acc.shape[1]
    for start in tl.range(0, R, BLOCK, num_stages=1):
        v = read_tile(v_ptr, first_row, start, M, R, R, BLOCK_M, BLOCK, False)
        v = narrow(v.to(tl.float32) * scale, v.dtype)
        if TRANSPOSED:
            small = read_tile(small_ptr, first_col, start, C, R, R, BLOCK_C, BLOCK, False).T
        else:
            small = read_tile(small_ptr, start, first_col, R, C, C, BLOCK, BLOCK_C, False)
        acc = dot_for(v, small, acc, NARROW)
    return acc


@triton.jit
def in_parts(acc, PARTS: tl.constexpr):
    """The columns of a tile as 1, 2 or 4 tiles, left to right: what is done to each takes fewer
    registers at a time.
    """
    if PARTS == 1:
        parts = (acc,)
    elif PARTS == 2:
        parts = _halves(acc)
    else:
        left, right = _halves(acc)
        parts = _halves(left) + _halves(right)
    return parts


@triton.jit
def _halves(tile):
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


def fused_configuration(
    kernel: str, base: tuple[Tensor, Tensor], adapter: torch.dtype, **sizes: int
) -> dict[str, Any]:
    """The tile for these operands of the base product; with descriptors if both can have one."""
    return configuration(
        kernel, base[0].device, adapter, base[0].dtype, all(map(describable, base)), **sizes
    )


def describable(t: Tensor) -> bool:
    """Whether the copy engine reads t [rows, cols] in place."""
    rows_apart = t.stride(0) >= t.shape[1] and t.stride(0) * t.element_size() % 16 == 0
    return t.numel() > 0 and t.stride(1) == 1 and rows_apart and t.data_ptr() % 16 == 0


def operand(t: Tensor, config: dict[str, Any], rows: str, cols: str) -> Any:
    """t itself, or its descriptor in tiles of these sizes, as the configuration wants it."""
    if not config["DESCRIPTORS"]:
        return t
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [config[rows], config[cols]])


def operand_type(dtype: str, config: dict[str, Any], rows: str, cols: str) -> str:
    """What ``operand`` makes of a tensor of that dtype, as a type."""
    if not config["DESCRIPTORS"]:
        return f"*{dtype}"
    return f"tensordesc<{dtype}[{config[rows]},{config[cols]}]>"


def programs(config: dict[str, Any], tasks: int, device: torch.device) -> tuple[int]:
    """The grid: as many programs as run at once, and no more than there are tiles."""
    return (min(tasks, dispatch.processors(device) * config["PROGRAMS"]),)


def fused_constants(config: dict[str, Any]) -> dict[str, Any]:
    flags = {name: config[name] for name in ("DESCRIPTORS", "PARTS", "GROUP")}
    return {**tiles(config), **flags, "SPECIALISED": config["SPECIALISED"] and _CAN_SPECIALISE}
