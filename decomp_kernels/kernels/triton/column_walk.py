"""One pass over a tall matrix, down its columns: everything that a backward takes from it at once.

    big [M, N]      u = big @ right        [M, r]     right [N, r]
                    c = left^T @ big       [r, N]     left  [M, r]
                    s = sum_m big          [N]
                    p = sum_m big * other  [N]        other [M, N]

Over dY this gives dH, dB, dbias and d_out_scale; over x, with the dropout mask applied to ``big``
in registers, it gives dA (reference/decomposed_linear.py).

One program owns BLOCK_N columns, BLOCK_R of the rank and a share of the rows.  c, s and p stay in
registers over the share; u leaves as one partial for each strip of columns, which is the cheaper
way while the rank is small (``partials_are_cheap``).  Partials are added in a fixed order: no
atomics, so the same inputs give the same bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, keep_mask
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import threshold


@triton.jit
def _kernel(
    big_ptr, right_ptr, left_ptr, other_ptr, seed_ptr,
    u_ptr, c_ptr, s_ptr, p_ptr,
    M, N, R, m_share, drop_threshold,
    HAS_U: tl.constexpr, HAS_C: tl.constexpr, HAS_S: tl.constexpr, HAS_P: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Rank blocks of one strip are neighbours: ``big`` comes from the level-2 cache after the first.
    rank_block, strip, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_col = strip * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_cols, in_ranks = cols < N, ranks < R
    c = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    p = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_U:
        right = tl.load(
            right_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :],
            mask=in_cols[:, None] & in_ranks[None, :], other=0.0,
        )  # fmt: skip
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(share * m_share, min((share + 1) * m_share, M), BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = rows < M
        tile = rows[:, None] * N + cols[None, :]
        inside = in_rows[:, None] & in_cols[None, :]
        big = tl.load(big_ptr + tile, mask=inside, other=0.0)
        if HAS_DROPOUT:
            kept = keep_mask(seed, rows, first_col, N, drop_threshold, BLOCK_N, ALIGNED)
            big = tl.where(kept, big, 0.0).to(big.dtype)
        if HAS_C:
            left = tl.load(
                left_ptr + rows[None, :] * R + ranks[:, None],
                mask=in_ranks[:, None] & in_rows[None, :], other=0.0,
            )  # fmt: skip
            c = dot(left, big, c)
        if HAS_U:
            u = dot(big, right, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            tl.store(
                u_ptr + (strip.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :], u,
                mask=in_rows[:, None] & in_ranks[None, :],
            )  # fmt: skip
        if HAS_S:
            s += tl.sum(big.to(tl.float32), 0)
        if HAS_P:
            other = tl.load(other_ptr + tile, mask=inside, other=0.0)
            p += tl.sum(big.to(tl.float32) * other.to(tl.float32), 0)
    if HAS_C:
        tl.store(
            c_ptr + (share.to(tl.int64) * R + ranks[:, None]) * N + cols[None, :], c,
            mask=in_ranks[:, None] & in_cols[None, :],
        )  # fmt: skip
    if rank_block == 0:
        if HAS_S:
            tl.store(s_ptr + share.to(tl.int64) * N + cols, s, mask=in_cols)
        if HAS_P:
            tl.store(p_ptr + share.to(tl.int64) * N + cols, p, mask=in_cols)


def column_walk(
    big: Tensor,
    *,
    right: Tensor | None = None,
    left: Tensor | None = None,
    other: Tensor | None = None,
    column_sum: bool = False,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(u, c, s, p) of the module's formulas in float32, each None where it is not asked for.

    big [M, N] bf16, fp16 or fp32; right and left in big's dtype or float32.  dropout masks big,
    whose kept elements are not divided by the kept fraction.
    """
    M, N = big.shape
    small = right if right is not None else left
    R = 1 if small is None else small.shape[1]
    config = _configuration(big, R, (right, left))
    block_m, block_n, block_r = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_R"]
    strips, rank_blocks = triton.cdiv(N, block_n), triton.cdiv(R, block_r)
    shares = min(config["SHARES"], max(1, triton.cdiv(M, block_m)))
    m_share = triton.cdiv(triton.cdiv(M, shares), block_m) * block_m

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        made = torch.zeros if M == 0 else torch.empty
        return made(shape, dtype=torch.float32, device=big.device) if wanted else None

    u = partial(right is not None, strips, M, R)
    c = partial(left is not None, shares, R, N)
    s = partial(column_sum, shares, N)
    p = partial(other is not None, shares, N)
    dropping = seed is not None and dropout > 0.0
    if M and N:
        _kernel[(rank_blocks, strips, shares)](
            big.contiguous(),
            None if right is None else right.contiguous(),
            None if left is None else left.contiguous(),
            None if other is None else other.contiguous(),
            seed if dropping else None, u, c, s, p, M, N, R, m_share, threshold(dropout),
            HAS_U=u is not None, HAS_C=c is not None, HAS_S=s is not None, HAS_P=p is not None,
            HAS_DROPOUT=dropping, ALIGNED=N % 4 == 0,
            **tiles(config), **launch_options(config),
        )  # fmt: skip
    u, c, s, p = (None if part is None else part.sum(0) for part in (u, c, s, p))
    return u, c, s, p


def partials_are_cheap(big: Tensor, right: Tensor) -> bool:
    """Whether u's partials, written and read once, are fewer bytes than another read of ``big``."""
    R = right.shape[1]
    return _configuration(big, R, (right,))["BLOCK_N"] * big.element_size() >= 2 * 4 * R


def _configuration(big: Tensor, R: int, small: tuple[Tensor | None, ...]) -> dict[str, Any]:
    float32 = any(t is not None and t.dtype == torch.float32 for t in (big, *small))
    adapter = torch.float32 if float32 else big.dtype
    return configuration("column_walk", big.device, adapter, M=big.shape[0], r=R)


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    over_dy = {"HAS_U": True, "HAS_C": True, "HAS_S": True, "HAS_P": True, "HAS_DROPOUT": False}
    over_x = {"HAS_U": False, "HAS_C": True, "HAS_S": False, "HAS_P": False, "HAS_DROPOUT": True}
    for dtypes, (wide, adapter) in DTYPES.items():
        for name, has in (("x dropout", over_x), ("dy", over_dy)):
            pointers = {
                "right_ptr": adapter if has["HAS_U"] else None, "left_ptr": adapter,
                "other_ptr": wide if has["HAS_P"] else None,
                "seed_ptr": "i64" if has["HAS_DROPOUT"] else None,
                "u_ptr": "fp32" if has["HAS_U"] else None, "c_ptr": "fp32",
                "s_ptr": "fp32" if has["HAS_S"] else None,
                "p_ptr": "fp32" if has["HAS_P"] else None, "big_ptr": wide,
            }  # fmt: skip
            types = {name: f"*{dtype}" for name, dtype in pointers.items() if dtype}
            types |= dict.fromkeys(("M", "N", "R", "m_share", "drop_threshold"), "i32")
            constants = {name: None for name, dtype in pointers.items() if not dtype}
            constants |= {**has, "ALIGNED": True, **tiles(config)}  # type: ignore[dict-item]
            yield Specimen(f"{dtypes} {name}", _kernel, types, constants, launch_options(config))
