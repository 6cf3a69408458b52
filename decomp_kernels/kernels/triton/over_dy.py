"""What one pass over dy gives a backward (see kernels/over_dy.py), by the kernel column_walk."""

from functools import partial

import torch
from torch import Tensor

from decomp_kernels.kernels import over_dy as shared
from decomp_kernels.kernels.triton.column_walk import column_walk, partials_are_cheap
from decomp_kernels.kernels.triton.down_projection import down_projection


def _walk(
    dy: Tensor,
    right: Tensor | None,
    left: Tensor | None,
    other: Tensor | None,
    scale: None,
    column_sum: bool,
) -> shared.Walked:
    """u of a pass of its own where its partial sums would be more bytes than another read of dy."""
    u = None
    if right is not None and not partials_are_cheap(dy, right):
        u, right = down_projection(dy, right.T, dtype=torch.float32), None
    c = s = p = None
    if right is not None or left is not None or other is not None or column_sum:
        walked, c, s, p = column_walk(
            dy, right=right, left=left, other=other, column_sum=column_sum
        )
        u = walked if u is None else u
    return shared.Walked(u, None if c is None else c.T.contiguous(), p, s)


over_dy = partial(shared.over_dy, _walk)
