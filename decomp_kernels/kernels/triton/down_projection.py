"""Down projections of one x in one pass:  t = drop(x * in_scale) A^T,  v = phi(t) * core * s

One adapter, or several that share x (q, k and v), each with its own rank, mask and scales.  One
program owns BLOCK_M rows, BLOCK_R of every adapter's rank and a share of K.  A tile of x is loaded
once for all adapters; masks and in_scale are applied in registers, so nothing of x's size is
written.  Where few rows would leave the device idle, K is split; a second kernel adds the partial
sums in a fixed order and finishes them as the first would.

    x: (M, K)    down: (R, K)    in_scale: (K,)    core: (R,)    t, v: (M, R) in down's dtype
    sums: (M, shares, R) float32, where K is split
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import activate, dot, keep_mask, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.reference.dropout import kept_fraction, threshold

_ADDING = {"num_warps": 8}  # of the kernel that adds shares: with 4 it spills under Triton 3.6


class Adapter(NamedTuple):
    """down [R, K] and what the terms of the module's formula are for it; s is ``scale``."""

    down: Tensor
    in_scale: Tensor | None = None
    seed: Tensor | None = None
    dropout: float = 0.0
    core: Tensor | None = None
    scale: float = 1.0
    activation: str = "identity"


class _Branch(NamedTuple):
    """An adapter as the kernels take it: pointers, None where absent, and sizes."""

    down: Any
    stride_down: Any
    in_scale: Any
    seed: Any
    threshold: Any
    after: Any
    core: Any
    scale: Any
    R: Any
    sums: Any
    t: Any
    v: Any


@triton.jit
def _kernel(
    x_ptr, branches, M, K, rank_blocks, k_share, stride_x,
    COUNT: tl.constexpr, PHI: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Programs of one row block are neighbours: x comes from the level-2 cache after the first.
    block, share = tl.program_id(0), tl.program_id(1)
    rows = (block // rank_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = (block % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    seeds = ()
    accs = ()
    for i in tl.static_range(COUNT):
        seed = 0 if branches[i].seed is None else tl.load(branches[i].seed)
        seeds = seeds + (seed,)  # type: ignore[assignment]
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)  # type: ignore[assignment]
    for start in range(share * k_share, min((share + 1) * k_share, K), BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = cols < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + cols[None, :],
            mask=(rows < M)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        added = ()
        for i in tl.static_range(COUNT):
            b = branches[i]
            down = tl.load(
                b.down + ranks[None, :].to(tl.int64) * b.stride_down + cols[:, None],
                mask=inside[:, None] & (ranks < b.R)[None, :], other=0.0,
            )  # fmt: skip
            kept_x = x
            if b.seed is not None:
                kept = keep_mask(seeds[i], rows, start, K, b.threshold, BLOCK_K, ALIGNED)
                kept_x = tl.where(kept, x, 0.0).to(x.dtype)
            if b.in_scale is not None:  # on the small operand, as the composition does: x stays
                scale = tl.load(b.in_scale + cols, mask=inside, other=0.0).to(tl.float32)
                down = narrow(down * scale[:, None], b.down.dtype.element_ty)
            added = added + (dot(kept_x, down, accs[i]),)  # type: ignore[assignment]
        accs = added
    for i in tl.static_range(COUNT):
        b = branches[i]
        if b.sums is None:
            _finish(b, accs[i], rows, ranks, M, PHI[i])
        else:
            place = (rows[:, None] * tl.num_programs(1) + share) * b.R + ranks[None, :]
            tl.store(b.sums + place, accs[i], mask=(rows < M)[:, None] & (ranks < b.R)[None, :])


@triton.jit
def _add_shares(
    branches, M, shares,
    COUNT: tl.constexpr, PHI: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    for i in tl.static_range(COUNT):
        inside = (rows < M)[:, None] & (ranks < branches[i].R)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for share in range(shares):
            place = (rows[:, None] * shares + share) * branches[i].R + ranks[None, :]
            acc += tl.load(branches[i].sums + place, mask=inside, other=0.0)
        _finish(branches[i], acc, rows, ranks, M, PHI[i])


@triton.jit
def _finish(b, acc, rows, ranks, M, PHI: tl.constexpr):
    """Store t and v of a tile, whichever are there, from its sums over K."""
    inside = (rows < M)[:, None] & (ranks < b.R)[None, :]
    place = rows[:, None] * b.R + ranks[None, :]
    t = narrow(acc * b.after, b.down.dtype.element_ty if b.t is None else b.t.dtype.element_ty)
    if b.t is not None:
        tl.store(b.t + place, t, mask=inside)
    if b.v is not None:  # from the rounded t, as backward sees it
        v = activate(t.to(tl.float32), PHI)
        if b.core is not None:
            core = tl.load(b.core + ranks, mask=ranks < b.R, other=0.0).to(tl.float32)
            v *= (core * b.scale)[None, :]
        else:
            v *= b.scale
        tl.store(b.v + place, narrow(v, b.v.dtype.element_ty), mask=inside)


def down_projection(
    x: Tensor,
    down: Tensor,
    in_scale: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """t [M, r] of one adapter alone, in ``dtype``, else in down's."""
    return down_projections(x, [Adapter(down, in_scale, seed, dropout)], dtype=dtype)[0][1]


def down_projections(
    x: Tensor,
    adapters: Sequence[Adapter],
    *,
    keep_t: bool = True,
    dtype: torch.dtype | None = None,
) -> list[tuple[Tensor | None, Tensor]]:
    """(t, v) of each adapter, accumulated in float32 and rounded once each; v from the rounded t.

    x [M, K] with neighbouring columns in neighbouring places, and any stride between rows.  The
    adapters have one dtype.  Where phi(t) * core * s is t, both are one tensor; else keep_t=False
    leaves t out.  dtype: of t, where it is not down's.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    kind, ranks = adapters[0].down.dtype, [adapter.down.shape[0] for adapter in adapters]
    config = configuration(
        "down_projection", x.device, kind, x.dtype,
        M=x.shape[0], r=max(ranks), adapters=len(adapters),
    )  # fmt: skip
    found = []
    for first in range(0, len(adapters), config["ADAPTERS"]):
        some = adapters[first : first + config["ADAPTERS"]]
        made = [_branch(x, adapter, keep_t, dtype or kind, config) for adapter in some]
        if x.shape[0]:
            _launch(x, made, tuple(ACTIVATIONS.index(one.activation) for one in some), config)
        found += [(b.t, b.t if b.v is None else b.v) for b in made]
    return found


def _branch(
    x: Tensor, adapter: Adapter, keep_t: bool, dtype: torch.dtype, config: dict[str, Any]
) -> _Branch:
    M, R = x.shape[0], adapter.down.shape[0]
    down = adapter.down if adapter.down.stride(-1) == 1 else adapter.down.contiguous()
    plain = adapter.core is None and adapter.scale == 1.0 and adapter.activation == "identity"
    dropping = adapter.dropout > 0.0 and adapter.seed is not None
    shares = _shares(x, config)
    return _Branch(
        down=down,
        stride_down=down.stride(0),
        in_scale=adapter.in_scale,
        seed=adapter.seed if dropping else None,
        threshold=threshold(adapter.dropout) if dropping else None,
        after=1.0 / kept_fraction(adapter.dropout) if dropping else 1.0,
        core=adapter.core,
        scale=float(adapter.scale),
        R=R,
        sums=x.new_empty((M, shares, R), dtype=torch.float32) if shares > 1 else None,
        t=x.new_empty((M, R), dtype=dtype) if keep_t or plain else None,
        v=None if plain else x.new_empty((M, R), dtype=down.dtype),
    )


def _shares(x: Tensor, config: dict[str, Any]) -> int:
    return min(config["SHARES"], triton.cdiv(x.shape[1], config["BLOCK_K"]))


def _launch(x: Tensor, made: list[_Branch], phi: tuple[int, ...], config: dict[str, Any]) -> None:
    (M, K), branches, shares = x.shape, tuple(made), _shares(x, config)
    row_blocks = triton.cdiv(M, config["BLOCK_M"])
    rank_blocks = triton.cdiv(max(b.R for b in branches), config["BLOCK_R"])
    k_share = triton.cdiv(triton.cdiv(K, config["BLOCK_K"]), shares) * config["BLOCK_K"]
    _kernel[(row_blocks * rank_blocks, shares)](
        x, branches, M, K, rank_blocks, k_share, x.stride(0),
        COUNT=len(branches), PHI=phi, ALIGNED=K % 4 == 0, **tiles(config), **launch_options(config),
    )  # fmt: skip
    if shares > 1:
        _add_shares[(row_blocks, rank_blocks)](
            branches, M, shares, COUNT=len(branches), PHI=phi,
            BLOCK_M=config["BLOCK_M"], BLOCK_R=config["BLOCK_R"], **_ADDING,
        )  # fmt: skip


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    """One plain adapter; as many as the configuration takes, with every option."""
    shared = config["SHARES"] > 1
    for dtypes, (wide, adapter) in DTYPES.items():
        plain = _Branch(
            down=f"*{adapter}", stride_down="i32", in_scale=None, seed=None, threshold=None,
            after="fp32", core=None, scale="fp32", R="i32",
            sums="*fp32" if shared else None, t=f"*{adapter}", v=None,
        )  # fmt: skip
        full = plain._replace(
            in_scale="*fp32", seed="*i64", threshold="i32", core="*fp32", v=f"*{adapter}"
        )
        group = {"COUNT": config["ADAPTERS"], "PHI": (3, 4, 2, 1)[: config["ADAPTERS"]]}
        if shared:
            types = {"branches": (full,) * config["ADAPTERS"], "M": "i32", "shares": "i32"}
            sizes = {name: config[name] for name in ("BLOCK_M", "BLOCK_R")}
            yield Specimen(
                f"{dtypes} shares", _add_shares, types, group | sizes, _ADDING, multiplies=False
            )
        for branches, count, name in (
            ((plain,), {"COUNT": 1, "PHI": (0,)}, ""),
            ((full,) * config["ADAPTERS"], group, f" {config['ADAPTERS']} in_scale dropout"),
        ):
            types = {
                "x_ptr": f"*{wide}", "branches": branches, "M": "i32", "K": "i32",
                "rank_blocks": "i32", "k_share": "i32", "stride_x": "i32",
            }  # fmt: skip
            constants = {**count, "ALIGNED": True, **tiles(config)}
            yield Specimen(f"{dtypes}{name}", _kernel, types, constants, launch_options(config))
