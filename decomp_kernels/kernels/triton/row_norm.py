"""Row norms of W + scale * B A in one read of W (maths: reference/row_norm.py).

    n^2 = ||W||^2 + scale * sum_r B * (2 U + scale * B G)        U = W A^T        G = A A^T [r, r]

One program owns BLOCK_M rows of W and walks K, with U in registers; the rest is rank-r work on U.
The rank is walked in blocks of BLOCK_R: W is read once for each, from the level-2 cache after the
first.  G is rank-r work and comes from the library.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.column_walk import column_walk
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles


@triton.jit
def _kernel(
    weight_ptr, weight_sq_ptr, down_ptr, up_ptr, inner_ptr, norm_ptr,
    N, K, R, stride_weight, scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < N
    total = tl.load(weight_sq_ptr + rows, mask=in_rows, other=1.0)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        in_ranks = ranks < R
        U = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(0, K, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            in_cols = cols < K
            weight = tl.load(
                weight_ptr + rows[:, None] * stride_weight + cols[None, :],
                mask=in_rows[:, None] & in_cols[None, :], other=0.0,
            )  # fmt: skip
            down = tl.load(
                down_ptr + ranks[None, :].to(tl.int64) * K + cols[:, None],
                mask=in_cols[:, None] & in_ranks[None, :], other=0.0,
            )  # fmt: skip
            U = dot(weight, down, U)
        place = rows[:, None] * R + ranks[None, :]
        both = in_rows[:, None] & in_ranks[None, :]
        up = tl.load(up_ptr + place, mask=both, other=0.0).to(tl.float32)
        inner = tl.load(inner_ptr + place, mask=both, other=0.0)  # scale * (B G)
        total += scale * tl.sum(up * (2.0 * U + inner), 1)
    tl.store(norm_ptr + rows, tl.maximum(total, 0.0), mask=in_rows)


def forward(weight: Tensor, weight_sq: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """n [N], float32."""
    N, K = weight.shape
    R = down.shape[0]
    weight, down, up = weight.contiguous(), down.contiguous(), up.contiguous()
    wide_down = down.float()
    inner = scale * (up.float() @ (wide_down @ wide_down.T))
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    config = configuration("row_norm", weight.device, down.dtype, M=N, r=R)
    _kernel[(triton.cdiv(N, config["BLOCK_M"]),)](
        weight, weight_sq, down, up, inner, norm, N, K, R, weight.stride(0), scale,
        **tiles(config), **launch_options(config),
    )  # fmt: skip
    return norm.sqrt_()  # the library's, as the norm of W alone is: at the start they are equal


def backward(
    d_norm: Tensor, norm: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(d_down, d_up), float32: one read of W gives U and the product with it."""
    A, B = down.float(), up.float()
    share = (d_norm / norm)[:, None]
    left = scale * share * B
    U, d_down, _, _ = column_walk(weight, right=down.T, left=left.to(torch.float32))
    if U is None or d_down is None:
        raise RuntimeError("the walk over W returned nothing")
    d_up = scale * share * (U + scale * (B @ (A @ A.T)))
    return d_down.add_(scale * (left.T @ B) @ A), d_up


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        types = {
            "weight_ptr": f"*{wide}", "weight_sq_ptr": "*fp32", "down_ptr": f"*{adapter}",
            "up_ptr": f"*{adapter}", "inner_ptr": "*fp32", "norm_ptr": "*fp32",
            "N": "i32", "K": "i32", "R": "i32", "stride_weight": "i32", "scale": "fp32",
        }  # fmt: skip
        yield Specimen(dtypes, _kernel, types, tiles(config), launch_options(config))
