"""W_eff = W * (1 + s B A) and the gradients of its factors (maths: reference/hadamard.py).

    P = g^T x    Q = W * P    dB = s Q A^T    dA = s B^T Q

One program owns a share of the rows of W and a share of its columns and walks their tiles: P is
made on the matrix units, in registers, and Q is taken into both gradients at once, so nothing of
W's size is stored.  Each share of columns has a partial dB [N, r] and each share of rows a partial
dA [r, K], float32 and at most SHARES of each.  Every block of the rank is added to them in memory
while Q is there: a tile's partials are 2 r / M of what it reads of g and x, where accumulators in
registers would make P anew for each rank block.

    W: (N, K) of any strides    g: (M, N)    x: (M, K)    B = up: (N, r)    A = down: (r, K)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import Hadamard
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.merged_weight import built
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.kernels.triton.weight_tile import (
    add_gradients,
    matched,
    outer_tile,
    shares_of,
)


@triton.jit
def _kernel(
    g_ptr, x_ptr, weight_ptr, up_ptr, down_ptr, d_up_ptr, d_down_ptr,
    M, N, K, R, n_share, k_share, stride_n, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = g_ptr.dtype.element_ty != tl.float32
    first_row, first_col = tl.program_id(0) * n_share, tl.program_id(1) * k_share
    d_up_ptr += tl.program_id(1).to(tl.int64) * N * R
    d_down_ptr += tl.program_id(0).to(tl.int64) * R * K
    for row in range(first_row, min(first_row + n_share, N), BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        for col in range(first_col, min(first_col + k_share, K), BLOCK_K):
            cols = col + tl.arange(0, BLOCK_K)
            P = outer_tile(g_ptr, x_ptr, rows, cols, M, N, K, BLOCK_M)
            weight = tl.load(
                weight_ptr + rows[:, None] * stride_n + cols[None, :].to(tl.int64) * stride_k,
                mask=(rows < N)[:, None] & (cols < K)[None, :], other=0.0,
            )  # fmt: skip
            add_gradients(
                P * weight.to(tl.float32), up_ptr, down_ptr, d_up_ptr, d_down_ptr,
                rows, cols, N, K, R,
                tl.where(col > first_col, R, 0), tl.where(row > first_row, R, 0), NARROW, BLOCK_R,
            )  # fmt: skip


def build(m: Hadamard, weight: Tensor) -> Tensor:
    return built(weight, (m.up, m.down), scale=m.scale, multiplies=True)


def contract(m: Hadamard, weight: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d_up, d_down) in the dtypes of up and down."""
    (N, K), M = weight.shape, g.shape[0]
    up, down = matched(m.up, m.down)
    R = up.shape[1]
    config = configuration("hadamard", weight.device, up.dtype, M=M, r=R)
    n_shares, n_share = shares_of(N, config["BLOCK_N"], config["SHARES"])
    k_shares, k_share = shares_of(K, config["BLOCK_K"], config["SHARES"])
    d_up = torch.empty(k_shares, N, R, dtype=torch.float32, device=g.device)
    d_down = torch.empty(n_shares, R, K, dtype=torch.float32, device=g.device)
    if N and K:
        _kernel[(n_shares, k_shares)](
            g.contiguous(), x.contiguous(), weight, up, down, d_up, d_down,
            M, N, K, R, n_share, k_share, weight.stride(0), weight.stride(1),
            **tiles(config), **launch_options(config),
        )  # fmt: skip
    return (
        d_up.sum(0).mul_(m.scale).to(m.up.dtype),
        d_down.sum(0).mul_(m.scale).to(m.down.dtype),
    )


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        types = {
            "g_ptr": f"*{wide}", "x_ptr": f"*{wide}", "weight_ptr": f"*{wide}",
            "up_ptr": f"*{adapter}", "down_ptr": f"*{adapter}",
            "d_up_ptr": "*fp32", "d_down_ptr": "*fp32",
            **dict.fromkeys(("M", "N", "K", "R", "n_share", "k_share"), "i32"),
            "stride_n": "i32", "stride_k": "i32",
        }  # fmt: skip
        yield Specimen(
            dtypes, _kernel, types, tiles(config), launch_options(config), unit=("stride_k",)
        )
