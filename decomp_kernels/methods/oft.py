"""OFT (Qiu et al. 2023, arXiv:2306.07280; OFTv2, arXiv:2506.19847): rotate blocks of the input.

    y = (x R) W^T + b,  W' = W R^T        R = blockdiag(R_1, ..., R_q), q blocks of size b, q b = K
    rotation [q, b (b - 1) / 2]: the upper triangles of skew Q_i, row by row; zeros: exact start

    Cayley-Neumann, 5 terms:  R_i = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, near (I + Q) (I - Q)^-1
    Cayley, exact:            R_i = (I - Q) (I + Q)^-1

The two turn in opposite directions, as they do in PEFT: an adapter trained with one is another
function under the other.  Blocks are made in float32 or wider, whatever the adapter's dtype.
"""

import math

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import BlockRotate, Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.ops.autocast import no_autocast
from decomp_kernels.ops.once import once_differentiable
from decomp_kernels.peft_form import PeftForm, PeftTensor

DEFAULT_SIZE = 32


@method("oft")
class OFT(Method):
    """r: number of blocks, or block_size: their size; give one of them.  With neither, the size is
    the divisor of K nearest to 32.  block_share: one rotation for all blocks.

    use_cayley_neumann: the polynomial, of num_cayley_neumann_terms terms, or the exact rotation.
    coft: before each use, Q is scaled back into a ball of radius eps (shared out over the blocks).
    """

    formula = "W R^T,  R = blockdiag(R_1, ..., R_q)"
    citation = "arXiv:2306.07280"
    trains = "K (b - 1) / 2"
    peft_form = PeftForm(
        "OFTConfig",
        "OFT",
        tensors={"rotation": PeftTensor("oft_R.*.weight")},
        options={
            "r": "r",
            "block_size": "oft_block_size",
            "block_share": "block_share",
            "use_cayley_neumann": "use_cayley_neumann",
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
            "coft": "coft",
            "eps": "eps",
        },
        fixed={"module_dropout": 0.0},
        bias_only="oft_only",
    )
    impls = dispatch.NOT_NATIVE
    aliases = {"oft_block_size": "block_size"}

    r: int | None = None
    block_size: int | None = None
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5

    def check_options(self) -> None:
        super().check_options()
        if self.r is not None and self.block_size is not None:
            raise ValueError("r * block_size = in_features: give r or block_size, not both")
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if self.num_cayley_neumann_terms < 2:
            raise ValueError(
                f"num_cayley_neumann_terms must be at least 2, got {self.num_cayley_neumann_terms}"
            )
        if self.eps <= 0:
            raise ValueError(f"eps must be above 0, got {self.eps}")

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        super().check_shape(out_features, in_features, name)
        for option in ("r", "block_size"):
            size = getattr(self, option)
            if size is not None and in_features % size:
                raise ValueError(
                    f"{option} must divide in_features = {in_features} of {name or 'this layer'}, "
                    f"got {size}; the nearest divisor is {nearest_divisor(in_features, size)}"
                )
        if self.sizes(in_features)[1] < 2:
            raise ValueError(
                f"OFT's blocks must have at least 2 columns: r = {self.r} divides in_features = "
                f"{in_features} of {name or 'this layer'} into single ones; lower r"
            )

    def sizes(self, in_features: int) -> tuple[int, int]:
        """(q, b): the number of blocks and their size."""
        if self.r is not None:
            return self.r, in_features // self.r
        b = self.block_size or nearest_divisor(in_features, DEFAULT_SIZE)
        return in_features // b, b

    def create(self, adapter: Adapter, base: Base) -> None:
        q, b = self.sizes(base.in_features)
        adapter.rotation = base.matrix(1 if self.block_share else q, b * (b - 1) // 2)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        q, b = self.sizes(base.in_features)
        triangle = adapter.rotation
        if self.coft:
            _shrink(triangle, self.eps)
            triangle = triangle.clone()  # another forward may shrink it before this one's backward
        with no_autocast(base.weight.device):
            Q = skew(triangle.to(base.scale_dtype), b)
            turns = self.num_cayley_neumann_terms
            R = cayley_neumann(Q, turns) if self.use_cayley_neumann else cayley(Q)
        return Factors(weight_map=BlockRotate(R.expand(1, q, b, b)))


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` nearest to ``wanted``, the smaller of two as near."""
    distance = 0
    while True:  # |number - wanted| at the latest: a number divides itself
        for candidate in (wanted - distance, wanted + distance):
            if candidate > 0 and number % candidate == 0:
                return candidate
        distance += 1


def skew(triangle: Tensor, b: int) -> Tensor:
    """Q [q, b, b] = U - U^T of the strict upper triangles [q, b (b - 1) / 2], row by row."""
    rows, cols = torch.triu_indices(b, b, 1, device=triangle.device)
    upper = triangle.new_zeros(triangle.shape[0], b * b).index_copy(1, rows * b + cols, triangle)
    upper = upper.view(-1, b, b)
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 of skew Q [..., b, b]: orthogonal; the two factors commute."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q, eye - Q)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1): every inner power twice, the last once.

    As PEFT counts: two terms are I + 2 Q, and three and four are both I + 2 Q + 2 Q^2 + Q^3.
    """
    if terms == 5:
        return _FiveTerms.apply(Q)
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + 2 * Q
    if terms == 2:
        return R
    last = max(terms - 1, 3)
    power = Q
    for exponent in range(2, last + 1):
        power = power @ Q
        R = R + (power if exponent == last else 2 * power)
    return R


class _FiveTerms(torch.autograd.Function):
    """The default, as (I + Q)^2 (I + Q^2) of skew Q [q, b, b]: two products, and three backward.

    The gradient is right up to a symmetric part, which skew Q has no use for: with S = Q^2 and its
    gradient's symmetric part D, dQ = -(D Q + Q D), whose two terms are each other's -transpose.
    """

    @staticmethod
    def forward(ctx, Q):
        S = Q @ Q
        square = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).add(Q, alpha=2).add_(S)
        ctx.save_for_backward(Q, S, square)
        return torch.baddbmm(square, square, S)

    @staticmethod
    @once_differentiable
    def backward(ctx, dR):
        Q, S, square = ctx.saved_tensors
        d_square = torch.baddbmm(dR, dR, S)
        dS = torch.baddbmm(d_square, square.mT, dR)
        dS = dS + dS.mT
        half = torch.bmm(dS, Q).mul_(0.5)
        return d_square.mul_(2).sub_(half).add_(half.mT)


@torch.no_grad()
def _shrink(rotation: Tensor, eps: float) -> None:
    """COFT's projection, in place: ||Q_i||_F at most eps / sqrt(rows), each row a triangle."""
    norm = math.sqrt(2) * rotation.norm(dim=1, keepdim=True)
    rotation.mul_((eps / math.sqrt(len(rotation)) / norm).clamp_(max=1.0))
