"""W_eff = W R^T, so that y = (x R) W^T, the definition.

    R = R_1 R_2 ... R_m      R_j = P_j blockdiag(D_j1, ..., D_jq) P_j^T      D_ji [b, b], q b = K

    x R_j: take the columns of x in the order permutations[j], multiply each run of b columns by
    its block, and put the columns back.  The blocks need not be orthogonal.

With x_j = x_{j-1} R_j, x_0 = x, and the gradient of x_m, gx_m = g W (W itself, not W_eff):

    dD_ji = (x_{j-1} P_j)_i^T (gx_j P_j)_i        gx_{j-1} = gx_j R_j^T        dx = gx_0

No gradient of a whole weight and no inverse: OFT's Cayley-Neumann blocks are singular where a
skew eigenvalue reaches i, so g W_eff could not be rotated forwards again.
Computed in float32, or float64 where W is float64, and rounded once.
"""

import torch
from torch import Tensor

from decomp_kernels.factors import BlockRotate


def rotate(t: Tensor, blocks: Tensor, permutation: Tensor | None) -> Tensor:
    """t R_j of t [..., K], blocks [q, b, b]; with transposed blocks, t R_j^T."""
    q, b, _ = blocks.shape
    taken = _taken(t, permutation).unflatten(-1, (q, b))
    turned = torch.einsum("...qi,qij->...qj", taken, blocks).flatten(-2)
    return turned if permutation is None else turned[..., permutation.argsort()]


def build(m: BlockRotate, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    turned = weight.to(wide)
    for j in reversed(range(m.blocks.shape[0])):
        turned = rotate(turned, m.blocks[j].to(wide).mT, _permutation(m, j))
    return turned.to(weight.dtype)


def forward(m: BlockRotate, x: Tensor) -> Tensor:
    """x R of x [M, K]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = x.to(wide)
    for j in range(m.blocks.shape[0]):
        turned = rotate(turned, m.blocks[j].to(wide), _permutation(m, j))
    return turned.to(x.dtype)


def contract(m: BlockRotate, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """d_blocks of g [M, N] and x [M, K]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return backward(m, g.to(wide) @ weight.to(wide), x.to(wide))[0]


def backward(m: BlockRotate, gx: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d_blocks, dx) of gx = g W [M, K], the gradient of x R, and x [M, K]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factors, q, b, _ = m.blocks.shape
    inputs = [x.to(wide)]  # x_{j-1} of every factor
    for j in range(factors - 1):
        inputs.append(rotate(inputs[j], m.blocks[j].to(wide), _permutation(m, j)))
    d_blocks = torch.empty_like(m.blocks, memory_format=torch.contiguous_format)
    turned = gx.to(wide)
    for j in reversed(range(factors)):
        order = _permutation(m, j)
        left, right = (_taken(t, order).unflatten(1, (q, b)) for t in (inputs[j], turned))
        d_blocks[j] = torch.einsum("mqi,mqj->qij", left, right)
        turned = rotate(turned, m.blocks[j].to(wide).mT, order)
    return d_blocks, turned.to(gx.dtype)


def _taken(t: Tensor, permutation: Tensor | None) -> Tensor:
    return t if permutation is None else t[..., permutation]


def _permutation(m: BlockRotate, j: int) -> Tensor | None:
    return None if m.permutations is None else m.permutations[j]
