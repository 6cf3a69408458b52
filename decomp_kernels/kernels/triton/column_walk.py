"""One pass over a tall matrix, down its columns: everything that a backward takes from it at once.

    big [M, N]      u = big @ right             [M, r]     right [N, r]
                    c = left^T @ drop(big)      [r, N]     left  [M, r], one or several
                    s = sum_m big               [N]
                    p = sum_m big * other       [N]        other [M, N]
                    scaled = other * scale      [M, N]     scale [N]

Over dY this gives dH, dB, dbias and d_out_scale; over x, with dX for ``other``, dA of every adapter
that shares x, each with its own mask in registers, d_in_scale and dx
(reference/decomposed_linear.py).

One program owns BLOCK_N columns, BLOCK_R of the rank and a share of the rows.  c, s and p stay in
registers over the share; u leaves as one partial for each strip of columns, which is the cheaper
way while the rank is small (``partials_are_cheap``).  Partials are added in a fixed order: no
atomics, so the same inputs give the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import threshold


class Left(NamedTuple):
    """A left factor [M, r] and its mask; nothing is divided by the kept fraction."""

    left: Tensor
    seed: Tensor | None = None
    dropout: float = 0.0


class Walked(NamedTuple):
    """What the module's formulas give, float32 but for ``scaled``; None where not asked for."""

    u: Tensor | None
    c: tuple[Tensor, ...]
    s: Tensor | None
    p: Tensor | None
    scaled: Tensor | None


class _Branch(NamedTuple):
    """A left factor as the kernel takes it: pointers, None where absent, and sizes."""

    left: Any
    seed: Any
    threshold: Any
    R: Any
    c: Any


@triton.jit
def _kernel(
    big_ptr, right_ptr, branches, other_ptr, scale_ptr, u_ptr, s_ptr, p_ptr, scaled_ptr,
    M, N, R, m_share,
    COUNT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Rank blocks of one strip are neighbours: ``big`` comes from the level-2 cache after the first.
    rank_block, strip, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_col = strip * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_cols = cols < N
    seeds = ()
    sums = ()
    for i in tl.static_range(COUNT):
        seed = 0 if branches[i].seed is None else tl.load(branches[i].seed)
        seeds = seeds + (seed,)  # type: ignore[assignment]
        sums = sums + (tl.zeros((BLOCK_R, BLOCK_N), tl.float32),)  # type: ignore[assignment]
    s = tl.zeros((BLOCK_N,), tl.float32)
    p = tl.zeros((BLOCK_N,), tl.float32)
    if u_ptr is not None:
        right = tl.load(
            right_ptr + cols[:, None].to(tl.int64) * R + ranks[None, :],
            mask=in_cols[:, None] & (ranks < R)[None, :], other=0.0,
        )  # fmt: skip
    own_rows = tl.where(rank_block == 0, M, 0)  # of ``other``, which one rank block alone reads
    if scaled_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
    for start in range(share * m_share, min((share + 1) * m_share, M), BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = rows < M
        tile = rows[:, None] * N + cols[None, :]
        inside = in_rows[:, None] & in_cols[None, :]
        big = tl.load(big_ptr + tile, mask=inside, other=0.0)
        added = ()
        for i in tl.static_range(COUNT):
            b = branches[i]
            kept_big = big
            if b.seed is not None:
                kept = keep_mask(seeds[i], rows, first_col, N, b.threshold, BLOCK_N, ALIGNED)
                kept_big = tl.where(kept, big, 0.0).to(big.dtype)
            left = tl.load(
                b.left + rows[None, :] * b.R + ranks[:, None],
                mask=(ranks < b.R)[:, None] & in_rows[None, :], other=0.0,
            )  # fmt: skip
            added = added + (dot(left, kept_big, sums[i]),)  # type: ignore[assignment]
        sums = added
        if u_ptr is not None:
            u = dot(big, right, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            tl.store(
                u_ptr + (strip.to(tl.int64) * M + rows[:, None]) * R + ranks[None, :], u,
                mask=in_rows[:, None] & (ranks < R)[None, :],
            )  # fmt: skip
        if s_ptr is not None:
            s += tl.sum(big.to(tl.float32), 0)
        if other_ptr is not None:
            mine = (rows < own_rows)[:, None] & in_cols[None, :]
            other = tl.load(other_ptr + tile, mask=mine, other=0.0).to(tl.float32)
            p += tl.sum(big.to(tl.float32) * other, 0)
            if scaled_ptr is not None:
                scaled = narrow(other * scale[None, :], scaled_ptr.dtype.element_ty)
                tl.store(scaled_ptr + tile, scaled, mask=mine)
    for i in tl.static_range(COUNT):
        place = (share.to(tl.int64) * branches[i].R + ranks[:, None]) * N + cols[None, :]
        inside_c = (ranks < branches[i].R)[:, None] & in_cols[None, :]
        tl.store(branches[i].c + place, sums[i], mask=inside_c)
    if rank_block == 0:
        if s_ptr is not None:
            tl.store(s_ptr + share.to(tl.int64) * N + cols, s, mask=in_cols)
        if p_ptr is not None:
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
    """(u, c, s, p) with one left factor or none; each None where it is not asked for."""
    lefts = [] if left is None else [Left(left, seed, dropout)]
    u, c, s, p, _ = walk_columns(big, lefts, right=right, other=other, column_sum=column_sum)
    return u, c[0] if c else None, s, p


def walk_columns(
    big: Tensor,
    lefts: Sequence[Left] = (),
    *,
    right: Tensor | None = None,
    other: Tensor | None = None,
    scale: Tensor | None = None,
    column_sum: bool = False,
) -> Walked:
    """big [M, N] and other of one dtype, bf16, fp16 or fp32; right and every left in it or float32.

    Masks act on c alone.  scale: ``scaled`` is written, in other's dtype.
    """
    M, N = big.shape
    smalls = [*([] if right is None else [right]), *(one.left for one in lefts)]
    config = _configuration(big, smalls, adapters=max(1, len(lefts)))
    block_m, at_once = config["BLOCK_M"], config["ADAPTERS"]
    shares = min(config["SHARES"], max(1, triton.cdiv(M, block_m)))
    R = 1 if right is None else right.shape[1]

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        made = torch.zeros if M == 0 else torch.empty
        return made(shape, dtype=torch.float32, device=big.device) if wanted else None

    u = partial(right is not None, triton.cdiv(N, config["BLOCK_N"]), M, R)
    s = partial(column_sum, shares, N)
    p = partial(other is not None, shares, N)
    scaled = None if scale is None or other is None else torch.empty_like(other.contiguous())
    branches = [_branch(one, partial(True, shares, one.left.shape[1], N)) for one in lefts]
    if M and N:
        big = big.contiguous()
        others = (right, other, scale, u, s, p, scaled)
        for first in range(0, max(1, len(branches)), at_once):
            some = branches[first : first + at_once]
            _launch(big, some, *(others if first == 0 else (None,) * 7), R, shares, config)
    u, s, p = (None if part is None else part.sum(0) for part in (u, s, p))
    return Walked(u, tuple(branch.c.sum(0) for branch in branches), s, p, scaled)


def _branch(one: Left, c: Tensor | None) -> _Branch:
    dropping = one.seed is not None and one.dropout > 0.0
    return _Branch(
        left=one.left.contiguous(),
        seed=one.seed if dropping else None,
        threshold=threshold(one.dropout) if dropping else None,
        R=one.left.shape[1],
        c=c,
    )


def _launch(big, branches, right, other, scale, u, s, p, scaled, R, shares, config) -> None:
    M, N = big.shape
    ranks = [branch.R for branch in branches] + ([] if right is None else [R])
    rank_blocks = triton.cdiv(max(ranks, default=1), config["BLOCK_R"])
    m_share = triton.cdiv(triton.cdiv(M, shares), config["BLOCK_M"]) * config["BLOCK_M"]
    _kernel[(rank_blocks, triton.cdiv(N, config["BLOCK_N"]), shares)](
        big, None if right is None else right.contiguous(), tuple(branches),
        None if other is None else other.contiguous(), scale, u, s, p, scaled, M, N, R, m_share,
        COUNT=len(branches), ALIGNED=N % 4 == 0, **tiles(config), **launch_options(config),
    )  # fmt: skip


def partials_are_cheap(big: Tensor, right: Tensor) -> bool:
    """Whether u's partials, written and read once, are fewer bytes than another read of ``big``."""
    block_n = _configuration(big, [right], adapters=1)["BLOCK_N"]
    return block_n * big.element_size() >= 2 * 4 * right.shape[1]


def _configuration(big: Tensor, smalls: list[Tensor], adapters: int) -> dict[str, Any]:
    """For ranks as large as the largest; float32 where any operand is."""
    float32 = any(t.dtype == torch.float32 for t in (big, *smalls))
    R = max((t.shape[1] for t in smalls), default=1)
    kind = torch.float32 if float32 else big.dtype
    return configuration("column_walk", big.device, kind, M=big.shape[0], r=R, adapters=adapters)


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    count = config["ADAPTERS"]
    for dtypes, (wide, adapter) in DTYPES.items():
        masked = _Branch(f"*{adapter}", "*i64", "i32", "i32", "*fp32")
        plain = masked._replace(seed=None, threshold=None)
        of_other = {"other_ptr": f"*{wide}", "p_ptr": "*fp32"}
        over_dy = {"right_ptr": f"*{adapter}", "u_ptr": "*fp32", "s_ptr": "*fp32", **of_other}
        over_x = {"scale_ptr": "*fp32", "scaled_ptr": f"*{wide}", **of_other}
        walks = [
            (f"x {count} dropout", (masked,) * count, {}),
            (f"x {count} dropout dx", (masked,) * count, over_x),
            ("dy", (plain,), over_dy),
        ]
        for name, branches, options in walks[: 3 if count == 1 else 2]:  # dY is one adapter's own
            types = {"big_ptr": f"*{wide}", "branches": branches, **options}
            types |= dict.fromkeys(("M", "N", "R", "m_share"), "i32")
            pointers = {p for p in _kernel.arg_names if p.endswith("_ptr")}
            constants = dict.fromkeys(pointers - types.keys())
            constants |= {"COUNT": len(branches), "ALIGNED": True, **tiles(config)}
            yield Specimen(f"{dtypes} {name}", _kernel, types, constants, launch_options(config))
