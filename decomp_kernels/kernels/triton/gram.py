"""Penalties on the Gram matrices of a whole model's factors, one launch each way.

    E = M M^T - I    or without its diagonal    forward   p = sum E^2    (maths: reference/gram.py)
    dM = factor * E M                           backward

M [r, L] is a down as it is, or an up [N, r] read by columns.  Matrices of one dtype and device
share a launch, whatever their shapes: a table holds address, sizes and kind of each.  A program
owns one tile of one matrix: [BLOCK_R, BLOCK_R] of E, or [BLOCK_R, BLOCK_L] of dM, whose long side
is L.  It walks all of L, or all of r, in order.

    table: int64 (matrices, 8), rows as ``_Launch.add`` makes them    residuals: float32 (G, r, r)
    parts: (matrices, tiles of the largest), 0 where a matrix has fewer
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import dot, dot_for, narrow
from decomp_kernels.kernels.triton.specimens import Specimen, launch_options, tiles
from decomp_kernels.reference.gram import groups

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _forward_kernel(
    table_ptr, parts_ptr, most,
    ELEMENT: tl.constexpr, LONG_ALIGNED: tl.constexpr, RANK_ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % most
    row_ptr = table_ptr + (tl.program_id(0) // most) * 8
    M_ptr, E_ptr, _, R, L, stride, of_rows, identity = _matrix(
        row_ptr, ELEMENT, LONG_ALIGNED or RANK_ALIGNED
    )
    blocks = tl.cdiv(R, BLOCK_R)
    if tile >= blocks * blocks:
        return
    i, j = tile // blocks, tile % blocks
    if i > j:  # E is symmetric
        return
    left = i * BLOCK_R + tl.arange(0, BLOCK_R)
    right = j * BLOCK_R + tl.arange(0, BLOCK_R)
    if of_rows:
        E = _gram(M_ptr, left, right, R, L, stride, True, LONG_ALIGNED, BLOCK_L)
    else:
        E = _gram(M_ptr, left, right, R, L, stride, False, RANK_ALIGNED, BLOCK_L)
    diagonal = left[:, None] == right[None, :]
    E = tl.where(diagonal, tl.where(identity, E - 1.0, 0.0), E)
    inside = (left < R)[:, None] & (right < R)[None, :]
    E = tl.where(inside, E, 0.0)
    wide_left, wide_right = left.to(tl.int64)[:, None], right.to(tl.int64)[None, :]
    tl.store(E_ptr + wide_left * R + wide_right, E, mask=inside)
    part = tl.sum(tl.sum(E * E, 1), 0)
    if i < j:
        tl.store(E_ptr + wide_right * R + wide_left, E, mask=inside)
        part = 2.0 * part
    tl.store(parts_ptr + tl.program_id(0), part)


@triton.jit
def _backward_kernel(
    table_ptr, d_loss_ptr, most, scale,
    ELEMENT: tl.constexpr, LONG_ALIGNED: tl.constexpr, RANK_ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % most
    row_ptr = table_ptr + (tl.program_id(0) // most) * 8
    M_ptr, E_ptr, d_ptr, R, L, stride, of_rows, _ = _matrix(
        row_ptr, ELEMENT, LONG_ALIGNED or RANK_ALIGNED
    )
    blocks = tl.cdiv(R, BLOCK_R)
    if tile >= blocks * tl.cdiv(L, BLOCK_L):
        return
    factor = 4.0 * scale * tl.load(d_loss_ptr)
    if not SQUARED:
        norm = _norm(E_ptr, R * R.to(tl.int64), 4096)
        factor = tl.where(norm > 0.0, factor / (2.0 * norm), 0.0)
    # Rank blocks of one piece of L are neighbours: M comes from the level-2 cache after the first.
    first_rank, first = tile % blocks * BLOCK_R, tile // blocks * BLOCK_L
    if of_rows:
        _gradient(
            M_ptr, E_ptr, d_ptr, first_rank, first, R, L, stride, factor, True, LONG_ALIGNED,
            BLOCK_R, BLOCK_L,
        )  # fmt: skip
    else:
        _gradient(
            M_ptr, E_ptr, d_ptr, first_rank, first, R, L, stride, factor, False, RANK_ALIGNED,
            BLOCK_R, BLOCK_L,
        )  # fmt: skip


@triton.jit
def _matrix(row_ptr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """What the table has of one matrix."""
    M_ptr = tl.load(row_ptr).to(tl.pointer_type(ELEMENT))
    E_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.float32))
    d_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        M_ptr, d_ptr = tl.multiple_of(M_ptr, 16), tl.multiple_of(d_ptr, 16)
    R, L = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    stride = tl.load(row_ptr + 5)
    return M_ptr, E_ptr, d_ptr, R, L, stride, tl.load(row_ptr + 6) != 0, tl.load(row_ptr + 7) != 0


@triton.jit
def _gram(
    M_ptr, left, right, R, L, stride,
    OF_ROWS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """M[left] M[right]^T."""
    acc = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for start in range(0, L, BLOCK_L):
        longs = start + tl.arange(0, BLOCK_L)
        at, inside = _places(M_ptr, left, longs, R, L, stride, OF_ROWS, ALIGNED)
        a = tl.load(at, mask=inside, other=0.0)
        at, inside = _places(M_ptr, right, longs, R, L, stride, OF_ROWS, ALIGNED)
        acc = dot(a, tl.trans(tl.load(at, mask=inside, other=0.0)), acc)
    return acc


@triton.jit
def _gradient(
    M_ptr, E_ptr, d_ptr, first_rank, first, R, L, stride, factor,
    OF_ROWS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dM, stored side by side as M would be without its stride: one tile."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    longs = first + tl.arange(0, BLOCK_L)
    acc = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
    for start in range(0, R, BLOCK_R):
        inner = start + tl.arange(0, BLOCK_R)
        E = tl.load(
            E_ptr + ranks[:, None].to(tl.int64) * R + inner[None, :],
            mask=(ranks < R)[:, None] & (inner < R)[None, :], other=0.0,
        )  # fmt: skip
        at, inside = _places(M_ptr, inner, longs, R, L, stride, OF_ROWS, ALIGNED)
        M = tl.load(at, mask=inside, other=0.0)
        if M.dtype == tl.float16:  # as two bf16 parts, which hold it, beside those of E
            M = M.to(tl.float32)
        acc = dot_for(E, M, acc, d_ptr.dtype.element_ty != tl.float32)
    packed = (L if OF_ROWS else R).to(tl.int64)
    at, inside = _places(d_ptr, ranks, longs, R, L, packed, OF_ROWS, ALIGNED)
    tl.store(at, narrow(acc * factor, d_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _places(base, ranks, longs, R, L, stride, OF_ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses [ranks, longs] in a matrix, and which of them it has.

    ALIGNED: neighbours come in groups of 16 bytes; the products below say so to the compiler.
    """
    if ALIGNED:
        GROUP: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
        stride = stride // GROUP * GROUP
        if OF_ROWS:
            L = L // GROUP * GROUP
        else:
            R = R // GROUP * GROUP
    if OF_ROWS:
        place = ranks[:, None].to(tl.int64) * stride + longs[None, :]
    else:
        place = longs[None, :].to(tl.int64) * stride + ranks[:, None]
    return base + place, (ranks < R)[:, None] & (longs < L)[None, :]


@triton.jit
def _norm(E_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        E = tl.load(E_ptr + place, mask=place < count, other=0.0)
        total += E * E
    return tl.sqrt(tl.sum(total, 0))


def forward(
    downs: Sequence[Tensor], ups: Sequence[Tensor], kind: str, squared: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """L, a float32 scalar on the first matrix's device, and E [G, r, r] of each group."""
    residuals = []
    for matrices, rank_axis in ((downs, 0), (ups, 1)):
        for group in groups(matrices):
            first = matrices[group[0]]
            r = first.shape[rank_axis]
            residuals.append(first.new_empty((len(group), r, r), dtype=torch.float32))
    penalties = []
    for launch in _launches(downs, ups, residuals, None, identity=kind == "o"):
        config = launch.config()
        most = triton.cdiv(launch.most_r, config["BLOCK_R"]) ** 2
        parts = torch.zeros((len(launch.rows), most), device=launch.device)
        launch.run(_forward_kernel, config, most, parts, most)
        of_matrix = parts.sum(1)
        penalties.append((of_matrix if squared else of_matrix.sqrt()).sum())
    loss = penalties[0]
    for penalty in penalties[1:]:
        loss = loss + penalty.to(loss.device)
    return loss * scale, residuals


def backward(
    d_loss: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    residuals: Sequence[Tensor],
    squared: bool,
    scale: float,
) -> list[Tensor]:
    """The gradients, by group as the residuals are: [G, r, K] of downs, then [G, N, r] of ups."""
    residuals = [E.contiguous() for E in residuals]
    grads = []
    for matrices in (downs, ups):
        for group in groups(matrices):
            first = matrices[group[0]]
            grads.append(first.new_empty((len(group), *first.shape)))
    for launch in _launches(downs, ups, residuals, grads, identity=True):
        config = launch.config()
        blocks = triton.cdiv(launch.most_r, config["BLOCK_R"])
        most = blocks * triton.cdiv(launch.most_L, config["BLOCK_L"])
        slope = d_loss.to(launch.device, torch.float32)
        launch.run(_backward_kernel, config, most, slope, most, scale, SQUARED=squared)
    return grads


@dataclass
class _Launch:
    """The matrices of one dtype and device."""

    dtype: torch.dtype
    device: torch.device
    rows: list[tuple[int, ...]]  # of the table
    copies: list[Tensor]  # of matrices that no stride describes
    most_r: int = 0
    most_L: int = 0
    long_aligned: bool = True
    rank_aligned: bool = True

    def add(self, M: Tensor, of_rows: bool, E: Tensor, grad: Tensor | None, identity: bool) -> None:
        if M.stride(1) != 1:
            M = M.contiguous()
            self.copies.append(M)
        R, L = M.shape if of_rows else M.T.shape
        d_address = 0 if grad is None else grad.data_ptr()
        address, stride, size = M.data_ptr(), M.stride(0), M.element_size()
        self.rows.append((address, E.data_ptr(), d_address, R, L, stride, of_rows, identity))
        self.most_r, self.most_L = max(self.most_r, R), max(self.most_L, L)
        places = address % 16 == d_address % 16 == 0
        runs = stride * size % 16 == M.shape[1] * size % 16 == 0
        self.long_aligned &= places and (runs or not of_rows)
        self.rank_aligned &= places and (runs or of_rows)

    def config(self) -> dict[str, Any]:
        return configuration("gram", self.device, self.dtype, r=self.most_r)

    def run(
        self, kernel: Any, config: dict[str, Any], most: int, *arguments: Any, **constants: Any
    ) -> None:
        """``most`` programs for each matrix, of which small ones return at once."""
        if most == 0:
            return
        table = _on_device(torch.tensor(self.rows, dtype=torch.int64), self.device)
        with dispatch.on(self.device):  # matrices of one call may be on several
            kernel[(len(self.rows) * most,)](
                table, *arguments, ELEMENT=_DTYPES[self.dtype],
                LONG_ALIGNED=self.long_aligned, RANK_ALIGNED=self.rank_aligned,
                **constants, **tiles(config), **launch_options(config),
            )  # fmt: skip


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table
    if dispatch.recording(device):
        raise RuntimeError(
            "gram_penalty with impl='triton:passes' must run outside the capture of a CUDA graph, "
            "which would not renew its table of addresses; use impl='aten' there"
        )
    # A copy from pageable memory would wait for all work before it.
    return table.pin_memory().to(device, non_blocking=True)


def _launches(
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    residuals: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    identity: bool,
) -> list[_Launch]:
    """identity: whether it is what E of an up leaves out, or else the diagonal; downs always."""
    found: dict[tuple[torch.dtype, torch.device], _Launch] = {}
    index = 0
    for matrices, of_rows in ((downs, True), (ups, False)):
        for group in groups(matrices):
            first = matrices[group[0]]
            key = (first.dtype, first.device)
            launch = found.setdefault(key, _Launch(*key, rows=[], copies=[]))
            for place, position in enumerate(group):
                grad = None if grads is None else grads[index][place]
                E = residuals[index][place]
                launch.add(matrices[position], of_rows, E, grad, of_rows or identity)
            index += 1
    return list(found.values())


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for name, element in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        constants = {"ELEMENT": element, "LONG_ALIGNED": True, "RANK_ALIGNED": True}
        constants |= tiles(config)
        options = launch_options(config)
        types = {"table_ptr": "*i64", "parts_ptr": "*fp32", "most": "i32"}
        yield Specimen(f"{name} forward", _forward_kernel, types, constants, options)
        types = {"table_ptr": "*i64", "d_loss_ptr": "*fp32", "most": "i32", "scale": "fp32"}
        constants = constants | {"SQUARED": False}
        yield Specimen(f"{name} backward", _backward_kernel, types, constants, options)
