"""Penalties on Gram matrices of low-rank factors, the definition.  L = scale * sum_i p(E_i)

    E = A A^T - I            for each A = down [r, K]
    E = B^T B - I            for each B = up [N, r], kind "o"
    E = B^T B - diag(B^T B)  for each B = up [N, r], kind "d"

    p(E) = ||E||_F^2:   dA = 4 scale E A             dB = 4 scale B E
    p(E) = ||E||_F:     dA = 2 scale E A / ||E||_F   dB = 2 scale B E / ||E||_F   and 0 where E = 0

MPC_o and MPC_d of arXiv 2407.05417 (eq. 25, 26) are sums of these.  The diagonal in kind "d" may or
may not be a constant for the gradient: E is 0 there.  Computed in float32, or float64 where the
factors are: this is the oracle.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("o", "d")


def groups(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the matrices that have one shape, dtype and device, in order of appearance."""
    found: list[tuple[tuple, list[int]]] = []  # no dict: sizes may be symbols, which have no hash
    for position, matrix in enumerate(matrices):
        key = (*matrix.shape, matrix.dtype, matrix.device)
        for other, members in found:
            if key == other:
                members.append(position)
                break
        else:
            found.append((key, [position]))
    return [members for _, members in found]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    downs: Sequence[Tensor], ups: Sequence[Tensor], kind: str, squared: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """L, a scalar, and E [G, r, r] for each of ``groups(downs)``, then of ``groups(ups)``."""
    per_down = [_minus_identity(A.to(wide(A.dtype)) @ A.to(wide(A.dtype)).T) for A in downs]
    per_up = []
    for B in ups:
        gram = B.to(wide(B.dtype)).T @ B.to(wide(B.dtype))
        per_up.append(_minus_identity(gram) if kind == "o" else gram - torch.diag(gram.diag()))
    norms = [torch.linalg.matrix_norm(E) for E in (*per_down, *per_up)]
    loss = scale * sum((norm**2 if squared else norm).to(norms[0].device) for norm in norms)
    stacked = [
        torch.stack([residuals[position] for position in group])
        for matrices, residuals in ((downs, per_down), (ups, per_up))
        for group in groups(matrices)
    ]
    return torch.as_tensor(loss), stacked


def backward(
    d_loss: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    residuals: Sequence[Tensor],
    squared: bool,
    scale: float,
) -> list[Tensor]:
    """The gradients, by group as the residuals are: [G, r, K] of downs, then [G, N, r] of ups."""
    down_groups = groups(downs)
    grads = []
    for index, group in enumerate((*down_groups, *groups(ups))):
        is_down = index < len(down_groups)
        matrices = downs if is_down else ups
        parts = []
        for position, E in zip(group, residuals[index], strict=True):
            slope = 4.0 * scale * E
            if not squared:
                norm = torch.linalg.matrix_norm(E)
                slope = 2.0 * scale * E / norm if norm > 0 else torch.zeros_like(E)
            matrix = matrices[position].to(E.dtype)
            parts.append(d_loss.to(E) * (slope @ matrix if is_down else matrix @ slope))
        grads.append(torch.stack(parts).to(matrices[group[0]].dtype))
    return grads


def _minus_identity(gram: Tensor) -> Tensor:
    return gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
