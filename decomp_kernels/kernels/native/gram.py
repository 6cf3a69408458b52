"""Penalties on Gram matrices, grouped, by the native library (maths: reference/gram.py).

One call for the matrices of one shape and dtype, which are read where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.reference.gram import groups


def forward(
    downs: Sequence[Tensor], ups: Sequence[Tensor], kind: str, squared: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    ops = native_library.ops()
    residuals, penalties = [], []
    for matrices, of_rows in ((downs, True), (ups, False)):
        for group in groups(matrices):
            some = [matrices[position].contiguous() for position in group]
            E, squares = ops.gram_fwd(some, of_rows, of_rows or kind == "o")
            residuals.append(E)
            penalty = (squares if squared else squares.sqrt_()).sum()
            penalties.append(penalty.to(downs[0].device))  # a model may be on several
    return torch.stack(penalties).sum() * scale, residuals


def backward(
    d_loss: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    residuals: Sequence[Tensor],
    squared: bool,
    scale: float,
) -> list[Tensor]:
    ops = native_library.ops()
    down_groups = groups(downs)
    grads = []
    for index, group in enumerate((*down_groups, *groups(ups))):
        of_rows = index < len(down_groups)
        matrices = downs if of_rows else ups
        E = residuals[index]
        factor = (d_loss.to(E) * (4.0 * scale)).expand(len(group))
        if not squared:
            norms = torch.linalg.vector_norm(E, dim=(1, 2))
            factor = torch.where(norms > 0, factor / (2.0 * norms), 0.0)
        some = [matrices[position].contiguous() for position in group]
        grads.append(ops.gram_bwd(some, E, factor.contiguous(), of_rows))
    return grads
