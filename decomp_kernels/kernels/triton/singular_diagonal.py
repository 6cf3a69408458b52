"""W_eff = W + U diag(d) V^T and the gradient of d (maths: reference/singular_diagonal.py).

    P = g^T x        dd_i = sum_n U_ni (P V)_ni = sum_m (g U)_mi (x V)_mi

By tokens: two projections and one pass that multiplies and sums, 2 M k (N + K) operations.  By the
weight, 2 N K (M + k): one program owns a share of the rows and of the columns of W and makes P tile
by tile in registers, where P V meets U at once; its partial dd [k] is float32, at most SHARES^2 of
them.

    g: (M, N)    x: (M, K)    U = left: (N, k)    V^T = right: (k, K)    d: (k,)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import SingularDiagonal
from decomp_kernels.kernels.triton.column_walk import column_walk
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.down_projection import down_projection
from decomp_kernels.kernels.triton.merged_weight import built
from decomp_kernels.kernels.triton.pieces import dot_for, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.kernels.triton.weight_tile import outer_tile, shares_of

# Coordinates of the tokens at a time: k may be all of min(N, K), and theirs are float32.
RANKS = 256


@triton.jit
def _kernel(
    g_ptr, x_ptr, left_ptr, right_ptr, total_ptr,
    M, N, K, R, n_share, k_share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = g_ptr.dtype.element_ty != tl.float32
    first_row, first_col = tl.program_id(0) * n_share, tl.program_id(1) * k_share
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    total_ptr += program.to(tl.int64) * R
    for row in range(first_row, min(first_row + n_share, N), BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        for col in range(first_col, min(first_col + k_share, K), BLOCK_K):
            cols = col + tl.arange(0, BLOCK_K)
            P = outer_tile(g_ptr, x_ptr, rows, cols, M, N, K, BLOCK_M)
            rounded = narrow(P, right_ptr.dtype.element_ty)
            summed = tl.where((row > first_row) | (col > first_col), R, 0)
            for start in range(0, R, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                in_ranks = ranks < R
                right = tl.load(
                    right_ptr + ranks[:, None].to(tl.int64) * K + cols[None, :],
                    mask=in_ranks[:, None] & (cols < K)[None, :], other=0.0,
                )  # fmt: skip
                left = tl.load(
                    left_ptr + rows[:, None] * R + ranks[None, :],
                    mask=(rows < N)[:, None] & in_ranks[None, :], other=0.0,
                )  # fmt: skip
                turned = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
                turned = dot_for(rounded, tl.trans(right), turned, NARROW)
                total = tl.load(total_ptr + ranks, mask=ranks < summed, other=0.0)
                total += tl.sum(turned * left.to(tl.float32), 0)
                tl.store(total_ptr + ranks, total, mask=in_ranks)
            tl.debug_barrier()  # the next tile's threads read what these have written


def build(m: SingularDiagonal, weight: Tensor) -> Tensor:
    return built(weight, (m.left, m.right), core=m.diagonal)


def contract(m: SingularDiagonal, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """d_diagonal of g [M, N] and x [M, K], by the way of fewer operations."""
    (N, K), M, R = weight.shape, g.shape[0], m.diagonal.shape[0]
    by_tokens = M * R * (N + K) <= N * K * (M + R)
    total = _from_tokens(m, g, x) if by_tokens else _from_weight(m, g, x)
    return total.to(m.diagonal.dtype)


def _from_tokens(m: SingularDiagonal, g: Tensor, x: Tensor) -> Tensor:
    parts = []
    for start in range(0, m.diagonal.shape[0], RANKS):
        left, right = m.left[:, start : start + RANKS], m.right[start : start + RANKS]
        u = down_projection(g, left.T, dtype=torch.float32)
        v = down_projection(x, right, dtype=torch.float32)
        *_, summed = column_walk(u, other=v)
        if summed is None:
            raise RuntimeError("the walk over the tokens returned nothing")
        parts.append(summed)
    return torch.cat(parts)


def _from_weight(m: SingularDiagonal, g: Tensor, x: Tensor) -> Tensor:
    M, N, K, R = g.shape[0], g.shape[1], x.shape[1], m.diagonal.shape[0]
    config = configuration("singular_diagonal", g.device, m.right.dtype, M=M, r=R)
    n_shares, n_share = shares_of(N, config["BLOCK_N"], config["SHARES"])
    k_shares, k_share = shares_of(K, config["BLOCK_K"], config["SHARES"])
    total = torch.empty(n_shares * k_shares, R, dtype=torch.float32, device=g.device)
    _kernel[(n_shares, k_shares)](
        g.contiguous(), x.contiguous(), m.left.contiguous(), m.right.contiguous(), total,
        M, N, K, R, n_share, k_share, **tiles(config), **launch_options(config),
    )  # fmt: skip
    return total.sum(0)


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        types = {
            "g_ptr": f"*{wide}", "x_ptr": f"*{wide}",
            "left_ptr": f"*{adapter}", "right_ptr": f"*{adapter}", "total_ptr": "*fp32",
            **dict.fromkeys(("M", "N", "K", "R", "n_share", "k_share"), "i32"),
        }  # fmt: skip
        yield Specimen(dtypes, _kernel, types, tiles(config), launch_options(config))
