"""Down projection in one pass over x:  t = drop(x * in_scale) A^T

One program owns BLOCK_M rows, BLOCK_R of the rank and a share of K.  The mask and in_scale are
applied in registers, so x is read once and nothing of its size is written.  Where few rows would
leave the device idle, K is split; the partial sums are added by a second, fixed-order pass.

    x: (M, K)    down: (r, K)    in_scale: (K,) or None    t: (M, r) in down's dtype
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import kept_fraction, threshold


@triton.jit
def _kernel(
    x_ptr, down_ptr, in_scale_ptr, seed_ptr, out_ptr,
    M, K, R, k_share, stride_x, stride_down, drop_threshold, after,
    HAS_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Programs of one row block are neighbours: x comes from the level-2 cache after the first.
    rank_blocks = tl.cdiv(R, BLOCK_R)
    block, share = tl.program_id(0), tl.program_id(1)
    rows = (block // rank_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (block % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(share * k_share, min((share + 1) * k_share, K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = cols < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + cols[None, :],
            mask=(rows < M)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        down = tl.load(
            down_ptr + ranks[None, :].to(tl.int64) * stride_down + cols[:, None],
            mask=inside[:, None] & (ranks < R)[None, :], other=0.0,
        )  # fmt: skip
        if HAS_DROPOUT:
            kept = keep_mask(seed, rows, start, K, drop_threshold, BLOCK_K, ALIGNED)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        if HAS_SCALE:  # on the small operand, as the composition does: x is not rounded again
            scale = tl.load(in_scale_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            down = narrow(down * scale[:, None], down_ptr.dtype.element_ty)
        acc = dot(x, down, acc)
    out = out_ptr + (share.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :]
    tl.store(
        out, narrow(acc * after, out_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (ranks < R)[None, :],
    )  # fmt: skip


def down_projection(
    x: Tensor,
    down: Tensor,
    in_scale: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """t [M, r] in ``dtype``, else in down's, accumulated in float32 and rounded once.

    x [M, K] with neighbouring columns in neighbouring places, and any stride between rows.
    """
    (M, K), R = x.shape, down.shape[0]
    x, down = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, down))
    dtype = down.dtype if dtype is None else dtype
    dropping = dropout > 0.0 and seed is not None
    config = configuration("down_projection", x.device, down.dtype, M=M, r=R)
    blocks = triton.cdiv(K, config["BLOCK_K"])
    shares = min(config["SHARES"], blocks)
    t = torch.empty((shares, M, R), dtype=torch.float32 if shares > 1 else dtype, device=x.device)
    if M:
        tasks = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(R, config["BLOCK_R"])
        _kernel[(tasks, shares)](
            x, down, in_scale, seed if dropping else None, t,
            M, K, R, triton.cdiv(blocks, shares) * config["BLOCK_K"], x.stride(0), down.stride(0),
            threshold(dropout), 1.0 / kept_fraction(dropout) if dropping else 1.0,
            HAS_SCALE=in_scale is not None, HAS_DROPOUT=dropping, ALIGNED=K % 4 == 0,
            **tiles(config), **launch_options(config),
        )  # fmt: skip
    return t.sum(0).to(dtype) if shares > 1 else t[0]


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        for full in (False, True):
            types = {
                "x_ptr": f"*{wide}", "down_ptr": f"*{adapter}",
                "out_ptr": f"*{'fp32' if config['SHARES'] > 1 else adapter}",
                "M": "i32", "K": "i32", "R": "i32", "k_share": "i32", "stride_x": "i32",
                "stride_down": "i32", "drop_threshold": "i32", "after": "fp32",
            }  # fmt: skip
            constants: dict[str, Any] = {
                "HAS_SCALE": full,
                "HAS_DROPOUT": full,
                "ALIGNED": True,
                **tiles(config),
            }
            if full:
                types |= {"in_scale_ptr": "*fp32", "seed_ptr": "*i64"}
            else:
                constants |= {"in_scale_ptr": None, "seed_ptr": None}
            name = f"{dtypes}{' in_scale dropout' if full else ''}"
            yield Specimen(name, _kernel, types, constants, launch_options(config))
