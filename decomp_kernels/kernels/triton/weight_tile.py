"""Tiles of a weight [N, K] that the kernels of the weight maps make in registers.

    B A      up [N, r], down [r, K]       walked in blocks of the rank
    g^T x    g [M, N], x [M, K]           the gradient of the effective weight, walked over tokens

``add_gradients`` takes a tile Q of the size of either into dB += Q A^T and dA += B^T Q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.pieces import dot, dot_for, narrow


@triton.jit
def product_tile(
    up_ptr, core_ptr, down_ptr, rows, cols, N, K, R,
    NARROW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(up * core) down for ``rows`` (int64) and ``cols``, float32; up * core in up's dtype.

    NARROW: what is made of it is rounded to bf16 or fp16.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    BLOCK_K: tl.constexpr = cols.shape[0]
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        in_ranks = ranks < R
        up = tl.load(
            up_ptr + rows[:, None] * R + ranks[None, :],
            mask=(rows < N)[:, None] & in_ranks[None, :], other=0.0,
        )  # fmt: skip
        down = tl.load(
            down_ptr + ranks[:, None].to(tl.int64) * K + cols[None, :],
            mask=in_ranks[:, None] & (cols < K)[None, :], other=0.0,
        )  # fmt: skip
        if core_ptr is not None:
            core = tl.load(core_ptr + ranks, mask=in_ranks, other=0.0).to(tl.float32)
            up = narrow(up.to(tl.float32) * core[None, :], up.dtype)
        product = dot_for(up, down, product, NARROW)
    return product


@triton.jit
def outer_tile(
    g_ptr, x_ptr, rows, cols, M, N, K,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """P = g^T x for ``rows`` of N (int64) and ``cols`` of K, float32."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    BLOCK_K: tl.constexpr = cols.shape[0]
    P = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        tokens = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = tokens < M
        g = tl.load(
            g_ptr + tokens[None, :] * N + rows[:, None],
            mask=(rows < N)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + tokens[:, None] * K + cols[None, :],
            mask=inside[:, None] & (cols < K)[None, :], other=0.0,
        )  # fmt: skip
        P = dot(g, x, P)
    return P


@triton.jit
def add_gradients(
    Q, up_ptr, down_ptr, d_up_ptr, d_down_ptr, rows, cols, N, K, R, up_ranks, down_ranks,
    NARROW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d_up += Q down^T and d_down += up^T Q: float32 sums in memory that one program owns.

    up_ranks, down_ranks: R where there is a sum yet, 0 where there is none.  Q is rounded to the
    factors' dtype.
    """
    for start in tl.range(0, R, BLOCK_R, num_stages=1):  # one block as a rule: nothing to overlap
        ranks = start + tl.arange(0, BLOCK_R)
        in_rows = (rows < N)[:, None] & (ranks < R)[None, :]
        in_cols = (ranks < R)[:, None] & (cols < K)[None, :]
        up_place = rows[:, None] * R + ranks[None, :]
        down_place = ranks[:, None].to(tl.int64) * K + cols[None, :]
        down = tl.trans(tl.load(down_ptr + down_place, mask=in_cols, other=0.0))
        up = tl.trans(tl.load(up_ptr + up_place, mask=in_rows, other=0.0))
        d_up = tl.load(d_up_ptr + up_place, mask=in_rows & (ranks < up_ranks)[None, :], other=0.0)
        d_down = tl.load(
            d_down_ptr + down_place, mask=in_cols & (ranks < down_ranks)[:, None], other=0.0
        )
        rounded = narrow(Q, up.dtype)
        d_up = dot_for(rounded, down, d_up, NARROW)
        d_down = dot_for(up, rounded, d_down, NARROW)
        tl.store(d_up_ptr + up_place, d_up, mask=in_rows)
        tl.store(d_down_ptr + down_place, d_down, mask=in_cols)
    tl.debug_barrier()  # the next tile's threads read what these have written


def matched(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and in one dtype, the wider of theirs."""
    dtype = torch.promote_types(up.dtype, down.dtype)
    return up.to(dtype).contiguous(), down.to(dtype).contiguous()


def shares_of(size: int, block: int, most: int) -> tuple[int, int]:
    """(number of shares, elements of each): whole blocks, at most ``most`` shares, none empty."""
    blocks = triton.cdiv(size, block)
    share = triton.cdiv(blocks, most)
    return triton.cdiv(blocks, max(share, 1)), share * block
