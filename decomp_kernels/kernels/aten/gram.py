"""Penalties on Gram matrices, grouped (maths: reference/gram.py).

Matrices of one shape are copied side by side and multiplied by one batched GEMM, so that a model
of hundreds of layers is a few dozen library calls.  The copy is made a block at a time into one
buffer that stays in cache: it costs less than the calls it saves, and no memory that grows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from decomp_kernels.reference.gram import groups, wide

# Elements a block, 4 MiB as float32.  On a 2-core AVX-512 server CPU (torch 2.13, one thread) 2^19
# and 2^20 are as fast as no copy at all, 2^22 is slower by a tenth.
_BLOCK_ELEMENTS = 1 << 20


def forward(
    downs: Sequence[Tensor], ups: Sequence[Tensor], kind: str, squared: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    residuals = []
    for group in groups(downs):
        E = _grams([downs[position] for position in group], of_rows=True)
        E.diagonal(dim1=1, dim2=2).sub_(1)
        residuals.append(E)
    for group in groups(ups):
        E = _grams([ups[position] for position in group], of_rows=False)
        diagonal = E.diagonal(dim1=1, dim2=2)
        diagonal.sub_(1) if kind == "o" else diagonal.zero_()
        residuals.append(E)
    penalties = [E.square().sum() if squared else _norms(E).sum() for E in residuals]
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
    down_groups = groups(downs)
    grads = []
    for index, group in enumerate((*down_groups, *groups(ups))):
        of_rows = index < len(down_groups)
        matrices = [(downs if of_rows else ups)[position] for position in group]
        E = residuals[index]
        factor = d_loss.to(E) * (4.0 * scale)
        if not squared:
            norms = _norms(E)[:, None, None]
            factor = torch.where(norms > 0, factor / (2.0 * norms), 0.0)
        grads.append(_times(factor * E, matrices, of_rows))
    return grads


def _grams(matrices: list[Tensor], of_rows: bool) -> Tensor:
    """[G, r, r]: M M^T of each, or M^T M."""
    r = matrices[0].shape[0 if of_rows else 1]
    out = matrices[0].new_empty((len(matrices), r, r), dtype=wide(matrices[0].dtype))
    for block, stacked in _stacked(matrices):
        left, right = (stacked, stacked.mT) if of_rows else (stacked.mT, stacked)
        torch.bmm(left, right, out=out[block])
    return out


def _times(slopes: Tensor, matrices: list[Tensor], of_rows: bool) -> Tensor:
    """slope @ M of each, or M @ slope, in M's dtype: [G, ...]."""
    out = matrices[0].new_empty((len(matrices), *matrices[0].shape))
    for block, stacked in _stacked(matrices):
        left, right = (slopes[block], stacked) if of_rows else (stacked, slopes[block])
        if out.dtype == stacked.dtype:
            torch.bmm(left, right, out=out[block])
        else:
            out[block] = torch.bmm(left, right)
    return out


def _stacked(matrices: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the matrices side by side, float32 or wider; the next one overwrites the last."""
    first = matrices[0]
    step = min(len(matrices), max(1, _BLOCK_ELEMENTS // max(first.numel(), 1)))
    buffer = first.new_empty((step, *first.shape))
    for start in range(0, len(matrices), step):
        block = slice(start, min(start + step, len(matrices)))
        part = buffer[: block.stop - block.start]
        torch.stack(matrices[block], out=part)  # one call; with a wider out it would be one each
        yield block, part.to(wide(first.dtype))


def _norms(E: Tensor) -> Tensor:
    return torch.linalg.vector_norm(E, dim=(1, 2))
