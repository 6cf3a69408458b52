"""Down projection in one pass over x:  t = drop(x * in_scale) A^T   (reference/decomposed_linear.py)

One program owns BLOCK_M rows, BLOCK_R of the rank and a share of K.  The mask and in_scale are
applied in registers, so x is read once and nothing of its size is written.  Where few rows would
leave the device idle, K is split; the partial sums are added by a second, fixed-order pass.

    x: (M, K)    down: (r, K)    in_scale: (K,) or None    t: (M, r) in down's dtype
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, keep_mask
from decomp_kernels.reference.dropout import kept_fraction, threshold


@triton.jit
def _kernel(
    x_ptr, down_ptr, in_scale_ptr, seed_ptr, out_ptr,
    M, K, R, k_share, stride_x, stride_down, drop_threshold, after,
    HAS_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    share = tl.program_id(2)
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
            kept = keep_mask(seed, rows, cols, K, drop_threshold, ALIGNED)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        if HAS_SCALE:  # on the small operand, as the composition does: x is not rounded again
            scale = tl.load(in_scale_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            down = (down * scale[:, None]).to(down_ptr.dtype.element_ty)
        acc = dot(x, down, acc)
    out = out_ptr + share * M.to(tl.int64) * R + rows[:, None] * R + ranks[None, :]
    tl.store(
        out, (acc * after).to(out_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (ranks < R)[None, :],
    )  # fmt: skip


def down_projection(
    x: Tensor, down: Tensor, in_scale: Tensor | None, seed: Tensor | None, dropout: float
) -> Tensor:
    """t [M, r] in down's dtype, accumulated in float32 and rounded once."""
    M, K = x.shape
    R = down.shape[0]
    x, down = x.contiguous(), down.contiguous()
    dropping = dropout > 0.0 and seed is not None
    config = configuration("down_projection", x.device, M=M, r=R)
    shares = min(config["SHARES"], triton.cdiv(K, config["BLOCK_K"]))
    k_share = triton.cdiv(triton.cdiv(K, shares), config["BLOCK_K"]) * config["BLOCK_K"]
    wide = shares > 1
    t = torch.empty(
        (shares, M, R), dtype=torch.float32 if wide else down.dtype, device=x.device
    )
    if M:
        grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]), shares)
        _kernel[grid](
            x, down, in_scale, seed if dropping else None, t,
            M, K, R, k_share, x.stride(0), down.stride(0),
            threshold(dropout), 1.0 / kept_fraction(dropout) if dropping else 1.0,
            HAS_SCALE=in_scale is not None, HAS_DROPOUT=dropping, ALIGNED=K % 4 == 0,
            BLOCK_M=config["BLOCK_M"], BLOCK_K=config["BLOCK_K"], BLOCK_R=config["BLOCK_R"],
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
    return t.sum(0).to(down.dtype) if wide else t[0]
