"""Row norms of W + scale * B A in one read of W (maths: reference/row_norm.py).

    n^2 = ||W||^2 + scale * sum_r B * (2 U + scale * B G)        U = W A^T        G = A A^T [r, r]

One program owns BLOCK_M rows of W and walks K, with U in registers; the rest is rank-r work on U.
The rank is walked in blocks of BLOCK_R: W is read once for each, from the level-2 cache after the
first.  G is rank-r work and comes from the library.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot


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
    tl.store(norm_ptr + rows, tl.sqrt(tl.maximum(total, 0.0)), mask=in_rows)


def forward(weight: Tensor, weight_sq: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """n [N], float32."""
    N, K = weight.shape
    R = down.shape[0]
    weight, down, up = weight.contiguous(), down.contiguous(), up.contiguous()
    wide_down = down.float()
    inner = scale * (up.float() @ (wide_down @ wide_down.T))
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    config = configuration("row_norm", weight.device, M=N, r=R)
    _kernel[(triton.cdiv(N, config["BLOCK_M"]),)](
        weight, weight_sq, down, up, inner, norm, N, K, R, weight.stride(0), scale,
        BLOCK_M=config["BLOCK_M"], BLOCK_K=config["BLOCK_K"], BLOCK_R=config["BLOCK_R"],
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return norm
