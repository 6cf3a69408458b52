"""W_eff = W + s (B1 A1) * (B2 A2) and the gradients of its factors (maths:
reference/double_hadamard.py).

    P = g^T x    T1 = s P * (B2 A2)    T2 = s P * (B1 A1)    dB = T A^T    dA = B^T T of each

The walk is that of hadamard.py: one program owns a share of the rows and a share of the columns of
W, makes P and the other pair's product for a tile in registers, and takes the tile into partial
gradients in memory, at most SHARES of each.

    W: (N, K) of any strides    g: (M, N)    x: (M, K)    up: (N, r)    down: (r, K)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import DoubleHadamard
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.merged_weight import built
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.kernels.triton.weight_tile import (
    add_gradients,
    matched,
    outer_tile,
    product_tile,
    shares_of,
)


@triton.jit
def _kernel(
    g_ptr, x_ptr, up1_ptr, down1_ptr, up2_ptr, down2_ptr,
    d_up1_ptr, d_down1_ptr, d_up2_ptr, d_down2_ptr,
    M, N, K, R1, R2, n_share, k_share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = g_ptr.dtype.element_ty != tl.float32
    first_row, first_col = tl.program_id(0) * n_share, tl.program_id(1) * k_share
    up_place, down_place = tl.program_id(1).to(tl.int64) * N, tl.program_id(0).to(tl.int64) * K
    d_up1_ptr += up_place * R1
    d_up2_ptr += up_place * R2
    d_down1_ptr += down_place * R1
    d_down2_ptr += down_place * R2
    for row in range(first_row, min(first_row + n_share, N), BLOCK_N):
        rows = (row + tl.arange(0, BLOCK_N)).to(tl.int64)
        for col in range(first_col, min(first_col + k_share, K), BLOCK_K):
            cols = col + tl.arange(0, BLOCK_K)
            P = outer_tile(g_ptr, x_ptr, rows, cols, M, N, K, BLOCK_M)
            other = product_tile(up2_ptr, None, down2_ptr, rows, cols, N, K, R2, NARROW, BLOCK_R)
            add_gradients(
                P * other, up1_ptr, down1_ptr, d_up1_ptr, d_down1_ptr, rows, cols, N, K, R1,
                tl.where(col > first_col, R1, 0), tl.where(row > first_row, R1, 0),
                NARROW, BLOCK_R,
            )  # fmt: skip
            other = product_tile(up1_ptr, None, down1_ptr, rows, cols, N, K, R1, NARROW, BLOCK_R)
            add_gradients(
                P * other, up2_ptr, down2_ptr, d_up2_ptr, d_down2_ptr, rows, cols, N, K, R2,
                tl.where(col > first_col, R2, 0), tl.where(row > first_row, R2, 0),
                NARROW, BLOCK_R,
            )  # fmt: skip


def build(m: DoubleHadamard, weight: Tensor) -> Tensor:
    return built(weight, (m.up1, m.down1), (m.up2, m.down2), scale=m.scale)


def contract(
    m: DoubleHadamard, weight: Tensor, g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_up1, d_down1, d_up2, d_down2), each in its factor's dtype."""
    (N, K), M = weight.shape, g.shape[0]
    up1, down1 = matched(m.up1, m.down1)
    up2, down2 = matched(m.up2, m.down2)
    if up1.dtype != up2.dtype:
        up1, down1, up2, down2 = (t.float() for t in (up1, down1, up2, down2))
    R1, R2 = up1.shape[1], up2.shape[1]
    config = configuration("double_hadamard", weight.device, up1.dtype, M=M, r=max(R1, R2))
    n_shares, n_share = shares_of(N, config["BLOCK_N"], config["SHARES"])
    k_shares, k_share = shares_of(K, config["BLOCK_K"], config["SHARES"])
    parts = [
        torch.empty(shape, dtype=torch.float32, device=g.device)
        for R in (R1, R2)
        for shape in ((k_shares, N, R), (n_shares, R, K))
    ]
    if N and K:
        _kernel[(n_shares, k_shares)](
            g.contiguous(), x.contiguous(), up1, down1, up2, down2, *parts,
            M, N, K, R1, R2, n_share, k_share, **tiles(config), **launch_options(config),
        )  # fmt: skip
    d_up1, d_down1, d_up2, d_down2 = (part.sum(0).mul_(m.scale) for part in parts)
    return (
        d_up1.to(m.up1.dtype),
        d_down1.to(m.down1.dtype),
        d_up2.to(m.up2.dtype),
        d_down2.to(m.down2.dtype),
    )


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    pairs = ("up1", "down1", "up2", "down2")
    for dtypes, (wide, adapter) in DTYPES.items():
        types = {
            "g_ptr": f"*{wide}", "x_ptr": f"*{wide}",
            **{f"{name}_ptr": f"*{adapter}" for name in pairs},
            **{f"d_{name}_ptr": "*fp32" for name in pairs},
            **dict.fromkeys(("M", "N", "K", "R1", "R2", "n_share", "k_share"), "i32"),
        }  # fmt: skip
        yield Specimen(dtypes, _kernel, types, tiles(config), launch_options(config))
