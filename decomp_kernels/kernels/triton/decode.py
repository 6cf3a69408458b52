"""The whole decomposed linear of a few rows in one launch (maths: reference/decomposed_linear.py).

    z = (x * in_scale) W^T + scale * (phi(t) * core) B^T + addend        t = (x * in_scale) A^T
    y = out_scale * z + bias

With at most 16 rows the time is that of reading W, which is read once.  One program owns BLOCK_N
columns of y and a share of K: it writes partial sums of z and t in float32 and counts itself in.
The last program of its columns to arrive adds the partials and does all the rest.  t is summed
again for each block of columns, which all write the same bits to the same place.

    x: (M, K)    weight: (N, K)    down: (r, K)    up: (N, r)    core: (r,)    in_scale: (K,)
    out_scale, bias: (N,)    addend, y, z: (M, N)    t: (M, r) in down's dtype

The counting is in integers and decides who adds, not in which order: partials are added first
share first, so the same inputs give the same bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import activate, dot, dot_for, narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles

ROWS = 16  # the most that one call takes

_arrived: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def _kernel(
    x_ptr, weight_ptr, down_ptr, up_ptr, core_ptr, in_scale_ptr, out_scale_ptr, bias_ptr,
    addend_ptr, z_part_ptr, t_part_ptr, arrived_ptr, y_ptr, t_ptr, z_ptr,
    M, N, K, R, splits, k_blocks, stride_x, stride_weight, stride_down, stride_up, scale,
    PHI: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Shares of one block of columns are neighbours: they end together.
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < M, cols < N
    inside = in_rows[:, None] & in_cols[None, :]
    place = rows[:, None] * N + cols[None, :]
    first = split * k_blocks * BLOCK_K
    end = min(first + k_blocks * BLOCK_K, K)

    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_ptr + cols[None, :].to(tl.int64) * stride_weight + ks[:, None],
            mask=(ks < K)[:, None] & in_cols[None, :], other=0.0,
        )  # fmt: skip
        x = _rows(x_ptr, rows, ks, M, K, stride_x)
        if down_ptr is not None:
            t = _project(x, down_ptr, in_scale_ptr, 0, ks, K, R, stride_down, t)
        if in_scale_ptr is not None:
            by = tl.load(in_scale_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
            x = narrow(x * by[None, :], x_ptr.dtype.element_ty)
        z = dot(x, weight, z)
    share = (split.to(tl.int64) * M + rows)[:, None]
    tl.store(z_part_ptr + share * N + cols[None, :], z, mask=inside)
    if down_ptr is not None:
        ranks = tl.arange(0, BLOCK_R)
        both = in_rows[:, None] & (ranks < R)[None, :]
        tl.store(t_part_ptr + share * R + ranks[None, :], t, mask=both)
        for block in range(BLOCK_R, R, BLOCK_R):
            t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for start in range(first, end, BLOCK_K):
                ks = start + tl.arange(0, BLOCK_K)
                x = _rows(x_ptr, rows, ks, M, K, stride_x)
                t = _project(x, down_ptr, in_scale_ptr, block, ks, K, R, stride_down, t)
            ranks = block + tl.arange(0, BLOCK_R)
            both = in_rows[:, None] & (ranks < R)[None, :]
            tl.store(t_part_ptr + share * R + ranks[None, :], t, mask=both)

    if _is_last(arrived_ptr + tile, splits, WARPS):
        tl.store(arrived_ptr + tile, 0)  # for the next launch
        z = _sum(z_part_ptr, place, inside, M * N, splits)
        if down_ptr is not None:
            for block in range(0, R, BLOCK_R):
                ranks = block + tl.arange(0, BLOCK_R)
                both = in_rows[:, None] & (ranks < R)[None, :]
                spot = rows[:, None] * R + ranks[None, :]
                total = _sum(t_part_ptr, spot, both, M * R, splits)
                kept = narrow(total, t_ptr.dtype.element_ty)
                if tile == 0:
                    tl.store(t_ptr + spot, kept, mask=both)
                v = activate(kept.to(tl.float32), PHI) * scale
                if core_ptr is not None:
                    core = tl.load(core_ptr + ranks, mask=ranks < R, other=0.0)
                    v *= core.to(tl.float32)[None, :]
                up = tl.load(
                    up_ptr + cols[None, :].to(tl.int64) * stride_up + ranks[:, None],
                    mask=(ranks < R)[:, None] & in_cols[None, :], other=0.0,
                )  # fmt: skip
                z = dot_for(v, up, z, y_ptr.dtype.element_ty != tl.float32)
        if addend_ptr is not None:
            z += tl.load(addend_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = z
        if out_scale_ptr is not None:
            tl.store(z_ptr + place, narrow(z, z_ptr.dtype.element_ty), mask=inside)
            y *= tl.load(out_scale_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + place, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows(x_ptr, rows, ks, M, K, stride_x):
    return tl.load(
        x_ptr + rows[:, None] * stride_x + ks[None, :],
        mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _project(x, down_ptr, in_scale_ptr, first, ks, K, R, stride_down, t):
    """t + x (A * in_scale)^T for the ranks from ``first`` on and the columns ``ks``."""
    ranks = first + tl.arange(0, t.shape[1])
    down = tl.load(
        down_ptr + ranks[None, :].to(tl.int64) * stride_down + ks[:, None],
        mask=(ks < K)[:, None] & (ranks < R)[None, :], other=0.0,
    )  # fmt: skip
    if in_scale_ptr is not None:  # on the small operand: x keeps its bits
        by = tl.load(in_scale_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
        down = narrow(down * by[:, None], down_ptr.dtype.element_ty)
    return dot(x, down, t)


@triton.jit
def _is_last(arrived_ptr, programs, WARPS: tl.constexpr):
    """Whether this program counts itself in last, after all its stores.

    Every warp counts, since on AMD a barrier does not wait for the stores of the other warps.  A
    warp has 32 lanes or 64; where it has 64 it counts twice.
    """
    lanes = tl.arange(0, 64 * WARPS)
    counting = lanes % 32 == 0
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + 0 * lanes, 1, mask=counting, sem="acq_rel")
    return tl.max(tl.where(counting, before, 0), 0) == 2 * WARPS * programs - 1


@triton.jit
def _sum(part_ptr, place, inside, distance, splits):
    """The partials of all shares, first to last; other programs wrote them."""
    total = tl.zeros(place.shape, tl.float32)
    for _ in range(splits):
        total += tl.load(part_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
        part_ptr += distance
    return total


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    addend: Tensor | None,
    scale: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, t, z) of at most 16 rows; z only beside out_scale, whose gradient alone needs it.

    Sums are float32 and rounded once.  t is rounded to down's dtype, and phi takes it from there,
    as it will in backward.
    """
    (M, K), N = x.shape, weight.shape[0]
    if M > ROWS:
        raise ValueError(f"decode takes at most {ROWS} rows, got {M}; use the other kernels")
    branch = down is not None and up is not None
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    down, up = (
        t if t is None or t.stride(-1) == 1 else t.contiguous()
        for t in ((down, up) if branch else (None, None))
    )
    R = 1 if down is None else down.shape[0]
    config = configuration("decode", x.device, (weight if down is None else down).dtype, M=M, r=R)
    blocks = triton.cdiv(K, config["BLOCK_K"])
    splits = max(1, min(config["SPLITS"], blocks))
    strips = max(1, triton.cdiv(N, config["BLOCK_N"]))
    y = x.new_empty(M, N)
    t = None if down is None else down.new_empty(M, R)
    z = None if out_scale is None else x.new_empty(M, N)
    z_part = x.new_empty(splits, M, N, dtype=torch.float32)
    t_part = None if down is None else x.new_empty(splits, M, R, dtype=torch.float32)
    if M:
        _kernel[(strips * splits,)](
            x, weight, down, up, core if branch else None, in_scale, out_scale, bias,
            None if addend is None else addend.contiguous(),
            z_part, t_part, _counters(x.device, strips), y, t, z,
            M, N, K, R, splits, triton.cdiv(blocks, splits),
            x.stride(0), weight.stride(0), 0 if down is None else down.stride(0),
            0 if up is None else up.stride(0), scale,
            PHI=ACTIVATIONS.index(activation), WARPS=config["num_warps"],
            **tiles(config), **launch_options(config),
        )  # fmt: skip
    return y, t, z


def _counters(device: torch.device, count: int) -> Tensor:
    """int32 [count or more], 0 before each launch, which leaves it so: zeroed when made.

    Launches of one stream follow one another and share it.  A CUDA graph may run beside any
    stream, so each call that is recorded has its own, zeroed by the graph.
    """
    if dispatch.recording(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = dispatch.stream(device)
    kept = _arrived.get((device, stream))
    if kept is None or len(kept) < count:
        kept = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _arrived[device, stream] = kept
    return kept


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    vectors = ("core_ptr", "in_scale_ptr", "out_scale_ptr")
    for dtypes, (wide, adapter) in DTYPES.items():
        for terms in ("base", "lora", "all"):
            pointers: dict[str, str | None] = dict.fromkeys(
                ("x_ptr", "weight_ptr", "y_ptr", "bias_ptr"), wide
            )
            pointers |= dict.fromkeys(("addend_ptr", "z_ptr"), wide if terms == "all" else None)
            pointers |= dict.fromkeys(vectors, "fp32" if terms == "all" else None)
            branch = terms != "base"
            pointers |= dict.fromkeys(("down_ptr", "up_ptr", "t_ptr"), adapter if branch else None)
            pointers |= {"z_part_ptr": "fp32", "t_part_ptr": "fp32" if branch else None}
            pointers |= {"arrived_ptr": "i32"}
            types = {name: f"*{dtype}" for name, dtype in pointers.items() if dtype}
            types |= dict.fromkeys(("M", "N", "K", "R", "splits", "k_blocks"), "i32")
            types |= {f"stride_{name}": "i32" for name in ("x", "weight", "down", "up")}
            types["scale"] = "fp32"
            constants: dict[str, Any] = {
                name: None for name, dtype in pointers.items() if not dtype
            }
            constants |= {"PHI": ACTIVATIONS.index("tanh" if terms == "all" else "identity")}
            constants |= {"WARPS": config["num_warps"], **tiles(config)}
            yield Specimen(f"{dtypes} {terms}", _kernel, types, constants, launch_options(config))
