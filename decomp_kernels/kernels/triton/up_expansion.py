"""Expansion of rank-r rows in one write:  out = sum_i undrop_i(v_i small_i) + bias + addend

With dropout these are the branches' parts of dX (small = A), each with its own mask; without, a
branch's part of z (small = B^T), on top of what z starts from.  The caller divides by the kept
fraction.  One program owns one tile of ``out`` and walks each rank in blocks; masks and sums are
in registers.

    v: (M, r)    small: (r, C), any strides    bias: (C,)    addend: (M, C)    out: (M, C)
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot_for, keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import threshold


class Expansion(NamedTuple):
    """v [M, r] and small [r, C] of one dtype, and the mask of their product."""

    v: Tensor
    small: Tensor
    seed: Tensor | None = None
    dropout: float = 0.0


class _Branch(NamedTuple):
    """An expansion as the kernel takes it: pointers, None where absent, and sizes."""

    v: Any
    small: Any
    stride_rank: Any
    stride_col: Any
    seed: Any
    threshold: Any
    R: Any


@triton.jit
def _kernel(
    branches, bias_ptr, addend_ptr, out_ptr, M, C,
    COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_C
    cols = first_col + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    tile = rows[:, None] * C + cols[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.static_range(COUNT):
        if branches[i].seed is None:
            acc = _expanded(branches[i], acc, rows, cols, M, C, NARROW, BLOCK_R)
        else:
            zero = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
            part = _expanded(branches[i], zero, rows, cols, M, C, NARROW, BLOCK_R)
            seed = tl.load(branches[i].seed)
            kept = keep_mask(seed, rows, first_col, C, branches[i].threshold, BLOCK_C, ALIGNED)
            acc += tl.where(kept, part, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if addend_ptr is not None:
        acc += tl.load(addend_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tile, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expanded(b, acc, rows, cols, M, C, NARROW: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc + v small, [BM, BC]."""
    for start in range(0, b.R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        v = tl.load(
            b.v + rows[:, None] * b.R + ranks[None, :],
            mask=(rows < M)[:, None] & (ranks < b.R)[None, :], other=0.0,
        )  # fmt: skip
        place = ranks[:, None].to(tl.int64) * b.stride_rank
        small = tl.load(
            b.small + place + cols[None, :].to(tl.int64) * b.stride_col,
            mask=(ranks < b.R)[:, None] & (cols < C)[None, :], other=0.0,
        )  # fmt: skip
        acc = dot_for(v, small, acc, NARROW)
    return acc


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
    """out [M, C] of one branch alone; see up_expansions."""
    return up_expansions([Expansion(v, small, seed, dropout)], dtype, bias=bias, addend=addend)


def up_expansions(
    expansions: Sequence[Expansion],
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """out [M, C] in ``dtype``, summed in float32 and rounded once a launch.

    Every v and small have one dtype, ``dtype`` or float32.
    """
    v = expansions[0].v
    M, C = v.shape[0], expansions[0].small.shape[1]
    out = torch.empty(M, C, dtype=dtype, device=v.device)
    R = max(one.v.shape[1] for one in expansions)
    count = len(expansions)
    config = configuration("up_expansion", v.device, v.dtype, M=M, r=R, adapters=count)
    if not M or not C:
        return out
    addend = None if addend is None else addend.contiguous()
    for first in range(0, count, config["ADAPTERS"]):
        branches = tuple(_branch(one) for one in expansions[first : first + config["ADAPTERS"]])
        _kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_C"]))](
            branches, bias, addend, out, M, C, COUNT=len(branches), ALIGNED=C % 4 == 0,
            **tiles(config), **launch_options(config),
        )  # fmt: skip
        bias, addend = None, out  # each program reads the tile that it writes, and no other
    return out


def _branch(one: Expansion) -> _Branch:
    dropping = one.dropout > 0.0 and one.seed is not None
    return _Branch(
        v=one.v.contiguous(),
        small=one.small,
        stride_rank=one.small.stride(0),
        stride_col=one.small.stride(1),
        seed=one.seed if dropping else None,
        threshold=threshold(one.dropout) if dropping else None,
        R=one.v.shape[1],
    )


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    count = config["ADAPTERS"]
    for dtypes, (wide, adapter) in DTYPES.items():
        masked = _Branch(
            f"*{adapter}", f"*{adapter}", "i32", "i32", seed="*i64", threshold="i32", R="i32"
        )
        plain = masked._replace(seed=None, threshold=None)
        for name, branches, unit in (
            ("bias addend", (plain,), "stride_rank"),
            (f"{count} dropout", (masked,) * count, "stride_col"),
        ):
            started = f"*{wide}" if branches == (plain,) else None
            types = {
                "branches": branches, "bias_ptr": started, "addend_ptr": started,
                "out_ptr": f"*{wide}", "M": "i32", "C": "i32",
            }  # fmt: skip
            constants = {"COUNT": len(branches), "ALIGNED": True, **tiles(config)}
            options = launch_options(config)
            yield Specimen(f"{dtypes} {name}", _kernel, types, constants, options, unit=(unit,))
