"""Gradient of the decomposed linear's input in one kernel (maths: reference/decomposed_linear.py).

    dX = (dy * out_scale) W + undrop(dt A)      d_x = in_scale * dX      d_in_scale = sum_m x * dX

One program takes tile after tile of d_x.  The rank-r product comes first, so that the dropout mask
is applied to it alone, and the base product over N goes on top in the same float32 accumulator.
d_in_scale leaves as one partial sum for each row of tiles, and these are added in a fixed order.
The kept fraction is the caller's to divide dt by.  Pointers or tensor descriptors: fused_tiles.py.

    dy: (M, N)    W: (N, K)    dt: (M, r)    A: (r, K)    out_scale: (N,)    in_scale: (K,)
    x, d_x: (M, K)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.fused_tiles import (
    base_product,
    fused_configuration,
    fused_constants,
    in_parts,
    operand,
    operand_type,
    programs,
    rank_product,
    tile_place,
)
from decomp_kernels.kernels.triton.pieces import keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options
from decomp_kernels.reference.dropout import threshold


@triton.jit
def _kernel(
    dy, weight, out_scale_ptr, dt_ptr, down_ptr, seed_ptr, in_scale_ptr, x_ptr,
    d_x_ptr, d_in_scale_ptr,
    M, N, K, R, stride_dy, stride_weight, drop_threshold,
    ALIGNED: tl.constexpr, NARROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALISED: tl.constexpr,
    PARTS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row_tiles, col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), warp_specialize=SPECIALISED
    ):
        row_tile, col_tile = tile_place(tile, row_tiles, col_tiles, GROUP)
        first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if dt_ptr is not None:
            acc = rank_product(
                dt_ptr, down_ptr, 1.0, acc, first_row, first_col, M, K, R, False, NARROW, BLOCK_R
            )  # fmt: skip
        if seed_ptr is not None:
            rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
            seed = tl.load(seed_ptr)
            kept = keep_mask(seed, rows, first_col, K, drop_threshold, BLOCK_K, ALIGNED)
            acc = tl.where(kept, acc, 0.0)
        acc = base_product(
            dy, weight, out_scale_ptr, acc, first_row, first_col, M, K, N,
            stride_dy, stride_weight, False, DESCRIPTORS, BLOCK_N,
        )  # fmt: skip
        parts = in_parts(acc, PARTS)
        for part in tl.static_range(PARTS):
            _finish(
                parts[part], first_row, first_col + part * (BLOCK_K // PARTS), row_tile, M, K,
                in_scale_ptr, x_ptr, d_x_ptr, d_in_scale_ptr,
            )  # fmt: skip


@triton.jit
def _finish(
    acc, first_row, first_col, row_tile, M, K, in_scale_ptr, x_ptr, d_x_ptr, d_in_scale_ptr
):  # fmt: skip
    """Everything between the accumulator and the stores of d_x and of a part of d_in_scale."""
    rows = first_row.to(tl.int64) + tl.arange(0, acc.shape[0])
    cols = first_col + tl.arange(0, acc.shape[1])
    place = rows[:, None] * K + cols[None, :]
    in_cols = cols < K
    inside = (rows < M)[:, None] & in_cols[None, :]
    if d_in_scale_ptr is not None:
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            d_in_scale_ptr + row_tile.to(tl.int64) * K + cols, tl.sum(x * acc, 0), mask=in_cols
        )  # fmt: skip
    if d_x_ptr is not None:
        if in_scale_ptr is not None:
            acc *= tl.load(in_scale_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        tl.store(d_x_ptr + place, narrow(acc, d_x_ptr.dtype.element_ty), mask=inside)


def fused_input_gradient(
    dy: Tensor,
    weight: Tensor,
    *,
    out_scale: Tensor | None = None,
    dt: Tensor | None = None,
    down: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    in_scale: Tensor | None = None,
    x: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x in dy's dtype where ``need_x``, d_in_scale in float32 where x is given).

    dy and W have one dtype, dt and A that one or float32; the others are used in float32.  dy and
    W may have any stride between rows.
    """
    (M, N), K = dy.shape, weight.shape[1]
    dy, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, weight))
    dropping = dt is not None and seed is not None and dropout > 0.0
    adapter, R = (dy.dtype, 0) if dt is None else (dt.dtype, dt.shape[1])
    config = fused_configuration(
        "fused_input_gradient", (dy, weight), adapter,
        M=M, r=R, dropout=int(dropping), scaled=int(out_scale is not None),
    )  # fmt: skip
    row_tiles = triton.cdiv(M, config["BLOCK_M"])
    d_x = torch.empty(M, K, dtype=dy.dtype, device=dy.device) if need_x else None
    parts = None
    if x is not None:
        made = torch.empty if M and N else torch.zeros
        parts = made(row_tiles, K, dtype=torch.float32, device=dy.device)
    if M and K and (need_x or x is not None):
        tasks = row_tiles * triton.cdiv(K, config["BLOCK_K"])
        _kernel[programs(config, tasks, dy.device)](
            operand(dy, config, "BLOCK_M", "BLOCK_N"),
            operand(weight, config, "BLOCK_N", "BLOCK_K"),
            *(None if t is None else t.contiguous() for t in (out_scale, dt, down)),
            seed if dropping else None,
            *(None if t is None else t.contiguous() for t in (in_scale, x)),
            d_x, parts, M, N, K, R, dy.stride(0), weight.stride(0), threshold(dropout),
            ALIGNED=K % 4 == 0, NARROW=dy.dtype != torch.float32,
            **fused_constants(config), **launch_options(config),
        )  # fmt: skip
    return d_x, None if parts is None else parts.sum(0)


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        options = {
            "in_scale_ptr": "*fp32", "x_ptr": f"*{wide}", "d_in_scale_ptr": "*fp32"
        }  # fmt: skip
        every = {**options, "out_scale_ptr": "*fp32", "seed_ptr": "*i64"}
        for terms, used in (("", {}), (" epilogue", options), (" all", every)):
            types = {
                "dy": operand_type(wide, config, "BLOCK_M", "BLOCK_N"),
                "weight": operand_type(wide, config, "BLOCK_N", "BLOCK_K"),
                "dt_ptr": f"*{adapter}", "down_ptr": f"*{adapter}", "d_x_ptr": f"*{wide}",
                "M": "i32", "N": "i32", "K": "i32", "R": "i32",
                "stride_dy": "i32", "stride_weight": "i32", "drop_threshold": "i32", **used,
            }  # fmt: skip
            constants: dict[str, Any] = {name: None for name in every if name not in used}
            constants |= {"ALIGNED": True, "NARROW": wide != "fp32", **fused_constants(config)}
            yield Specimen(
                dtypes + terms, _kernel, types, constants, launch_options(config),
                uses={"scaled": int(used is every), "dropout": int(used is every)},
            )  # fmt: skip
