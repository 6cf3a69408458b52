"""Expansion of rank-r rows in one write:  out = undrop(v small) + bias + addend

With dropout this is the branch's part of dX (small = A); without, the branch's part of z
(small = B^T), on top of what z starts from.  The kept fraction is the caller's to divide by.  One
program owns one tile of ``out`` and walks the rank in blocks; mask and sums are in registers.

    v: (M, r)    small: (r, C), any strides    bias: (C,)    addend: (M, C)    out: (M, C)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot_for, keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import threshold


@triton.jit
def _kernel(
    v_ptr, small_ptr, bias_ptr, addend_ptr, seed_ptr, out_ptr,
    M, C, R, stride_rank, stride_col, drop_threshold,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_C
    cols = first_col + tl.arange(0, BLOCK_C)
    in_rows, in_cols = rows < M, cols < C
    inside = in_rows[:, None] & in_cols[None, :]
    tile = rows[:, None] * C + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        in_ranks = ranks < R
        v = tl.load(
            v_ptr + rows[:, None] * R + ranks[None, :],
            mask=in_rows[:, None] & in_ranks[None, :], other=0.0,
        )  # fmt: skip
        place = ranks[:, None].to(tl.int64) * stride_rank + cols[None, :].to(tl.int64) * stride_col
        both = in_ranks[:, None] & in_cols[None, :]
        small = tl.load(small_ptr + place, mask=both, other=0.0)
        acc = dot_for(v, small, acc, NARROW)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        kept = keep_mask(seed, rows, first_col, C, drop_threshold, BLOCK_C, ALIGNED)
        acc = tl.where(kept, acc, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if HAS_ADDEND:
        acc += tl.load(addend_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tile, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


def up_expansion(
    v: Tensor,
    small: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """out [M, C] in ``dtype``, summed in float32 and rounded once.

    v and small have one dtype, ``dtype`` or float32.
    """
    (M, R), C = v.shape, small.shape[1]
    dropping = dropout > 0.0 and seed is not None
    out = torch.empty(M, C, dtype=dtype, device=v.device)
    config = configuration("up_expansion", v.device, v.dtype, M=M, r=R)
    if M and C:
        _kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_C"]))](
            v.contiguous(), small, bias, None if addend is None else addend.contiguous(),
            seed if dropping else None, out,
            M, C, R, small.stride(0), small.stride(1), threshold(dropout),
            HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None,
            HAS_DROPOUT=dropping, ALIGNED=C % 4 == 0,
            **tiles(config), **launch_options(config),
        )  # fmt: skip
    return out


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        for backward in (False, True):
            types = {
                "v_ptr": f"*{adapter}", "small_ptr": f"*{adapter}", "out_ptr": f"*{wide}",
                "M": "i32", "C": "i32", "R": "i32", "stride_rank": "i32", "stride_col": "i32",
                "drop_threshold": "i32",
            }  # fmt: skip
            constants: dict[str, Any] = {
                "HAS_BIAS": not backward, "HAS_ADDEND": not backward, "HAS_DROPOUT": backward,
                "ALIGNED": True, **tiles(config),
            }  # fmt: skip
            if backward:
                types["seed_ptr"] = "*i64"
                constants |= {"bias_ptr": None, "addend_ptr": None}
            else:
                types |= {"bias_ptr": f"*{wide}", "addend_ptr": f"*{wide}"}
                constants["seed_ptr"] = None
            unit = "stride_col" if backward else "stride_rank"
            name = f"{dtypes} {'dropout' if backward else 'bias addend'}"
            yield Specimen(name, _kernel, types, constants, launch_options(config), unit=(unit,))
