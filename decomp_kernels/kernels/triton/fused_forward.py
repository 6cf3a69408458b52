"""Forward of the decomposed linear in one kernel (maths: reference/decomposed_linear.py).

    z = (x * in_scale) W^T + scale * v B^T + addend        y = out_scale * z + bias

One program takes tile after tile of y: the base product over K, the rank-r step into the same
float32 accumulator, and everything else before the one rounding at the store.  v is rank-r work
of the caller.  Two forms of one body, pointers or tensor descriptors: fused_tiles.py.

    x: (M, K)    W: (N, K)    v: (M, r)    B: (N, r)    in_scale: (K,)    out_scale, bias: (N,)
    addend, z, y: (M, N)
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
from decomp_kernels.kernels.triton.pieces import narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options


@triton.jit
def _kernel(
    x, weight, in_scale_ptr, v_ptr, up_ptr, addend_ptr, out_scale_ptr, bias_ptr, z_ptr, y_ptr,
    M, N, K, R, stride_x, stride_weight, scale,
    DESCRIPTORS: tl.constexpr, SPECIALISED: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    out_type: tl.constexpr = y_ptr.dtype.element_ty
    row_tiles, col_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), warp_specialize=SPECIALISED
    ):
        row_tile, col_tile = tile_place(tile, row_tiles, col_tiles, GROUP)
        first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_N
        acc = base_product(
            x, weight, in_scale_ptr, tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            first_row, first_col, M, N, K, stride_x, stride_weight, True, DESCRIPTORS, BLOCK_K,
        )  # fmt: skip
        if v_ptr is not None:
            acc = rank_product(
                v_ptr, up_ptr, scale, acc, first_row, first_col, M, N, R,
                True, out_type != tl.float32, BLOCK_R,
            )  # fmt: skip
        parts = in_parts(acc, PARTS)
        for part in tl.static_range(PARTS):
            _finish(
                parts[part], first_row, first_col + part * (BLOCK_N // PARTS), M, N,
                addend_ptr, out_scale_ptr, bias_ptr, z_ptr, y_ptr,
            )  # fmt: skip


@triton.jit
def _finish(
    acc, first_row, first_col, M, N, addend_ptr, out_scale_ptr, bias_ptr, z_ptr, y_ptr
):  # fmt: skip
    """Everything between the accumulator and the stores of z and y."""
    rows = first_row.to(tl.int64) + tl.arange(0, acc.shape[0])
    cols = first_col + tl.arange(0, acc.shape[1])
    place = rows[:, None] * N + cols[None, :]
    in_cols = cols < N
    inside = (rows < M)[:, None] & in_cols[None, :]
    if addend_ptr is not None:
        acc += tl.load(addend_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + place, narrow(acc, z_ptr.dtype.element_ty), mask=inside)
    if out_scale_ptr is not None:
        acc *= tl.load(out_scale_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, narrow(acc, y_ptr.dtype.element_ty), mask=inside)


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    v: Tensor | None = None,
    up: Tensor | None = None,
    scale: float = 1.0,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    addend: Tensor | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, z) in x's dtype; z, which is y before out_scale and bias, where ``keep_z``.

    x and W have one dtype, v and B that one or float32; the others are used in float32.  x and W
    may have any stride between rows.
    """
    (M, K), N = x.shape, weight.shape[0]
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    adapter, R = (x.dtype, 0) if v is None else (v.dtype, v.shape[1])
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if keep_z else None
    config = fused_configuration(
        "fused_forward", (x, weight), adapter, M=M, r=R, scaled=int(in_scale is not None)
    )
    if M and N:
        tasks = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
        _kernel[programs(config, tasks, x.device)](
            operand(x, config, "BLOCK_M", "BLOCK_K"),
            operand(weight, config, "BLOCK_N", "BLOCK_K"),
            *(
                None if t is None else t.contiguous()
                for t in (in_scale, v, up, addend, out_scale, bias)
            ),
            z, y, M, N, K, R, x.stride(0), weight.stride(0), scale,
            **fused_constants(config), **launch_options(config),
        )  # fmt: skip
    return y, z


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        options = {
            "addend_ptr": f"*{wide}", "out_scale_ptr": "*fp32", "bias_ptr": f"*{wide}",
            "z_ptr": f"*{wide}",
        }  # fmt: skip
        every = {**options, "in_scale_ptr": "*fp32"}
        for terms, used in (("", {}), (" epilogue", options), (" all", every)):
            types = {
                "x": operand_type(wide, config, "BLOCK_M", "BLOCK_K"),
                "weight": operand_type(wide, config, "BLOCK_N", "BLOCK_K"),
                "v_ptr": f"*{adapter}", "up_ptr": f"*{adapter}", "y_ptr": f"*{wide}",
                "M": "i32", "N": "i32", "K": "i32", "R": "i32",
                "stride_x": "i32", "stride_weight": "i32", "scale": "fp32", **used,
            }  # fmt: skip
            unused = {name: None for name in every if name not in used}
            yield Specimen(
                dtypes + terms, _kernel, types, {**unused, **fused_constants(config)},
                launch_options(config), uses={"scaled": int(used is every)},
            )  # fmt: skip
