"""The form that every method lowers to, and the closed set of weight maps.

    y = out_scale * ( X W_eff^T + scale * (phi(drop(X) A^T) * core) B^T + addend ) + bias
    X = x * in_scale        A = down [r, K]    B = up [N, r]    W_eff = weight_map(W) or W

This file knows shapes and names only.  What the numbers are is said in ``reference/``.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from torch import Tensor

ACTIVATIONS = ("identity", "relu", "silu", "gelu", "tanh")


@dataclass(frozen=True, eq=False)
class WeightMap:
    """A change of the whole weight, W [N, K] -> W_eff [N, K]; one ``ops/`` file each."""

    op: ClassVar[str]  # the file under ops/ that builds and contracts it

    def named_tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class Hadamard(WeightMap):
    """W_eff = W * (1 + scale * up @ down).  up [N, r], down [r, K]."""

    op = "hadamard"
    up: Tensor
    down: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class DoubleHadamard(WeightMap):
    """W_eff = W + scale * (up1 @ down1) * (up2 @ down2).  up [N, r], down [r, K]."""

    op = "double_hadamard"
    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class BlockRotate(WeightMap):
    """W_eff = W R^T, so y = (x R) W^T, with R = prod_j  P_j blockdiag(blocks[j]) P_j^T.

    blocks [m, q, b, b] with q * b = K.  permutations [m, K] int64 or None: row j lists the
    columns of x in the order in which the blocks of factor j take them.
    """

    op = "block_rotate"
    blocks: Tensor
    permutations: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SingularDiagonal(WeightMap):
    """W_eff = W + left @ diag(diagonal) @ right.  left [N, k], diagonal [k], right [k, K]."""

    op = "singular_diagonal"
    left: Tensor
    diagonal: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class Scatter(WeightMap):
    """W_eff = W, plus values[j] at [rows[j], cols[j]].  rows, cols int64 [nnz], no pair twice."""

    op = "scatter"
    rows: Tensor
    cols: Tensor
    values: Tensor


class Factors(NamedTuple):  # made in every forward, at a third of a frozen dataclass's cost
    """What a method lowers to.  An absent term is None; a tensor's presence is the flag.

    down [r, K], up [N, r], core [r], in_scale [K], out_scale [N], addend [..., N].
    ``bias`` and ``weight`` replace the layer's own where they are given.  ``save_output`` keeps
    y instead of the tensor before out_scale for the gradient of out_scale: less memory where the
    next layer keeps y anyway, but no bias, no zero in out_scale and no in-place consumer of y.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    core: Tensor | None = None
    scale: float = 1.0
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    addend: Tensor | None = None
    activation: str = "identity"
    bias: Tensor | None = None
    weight: Tensor | None = None
    weight_map: WeightMap | None = None
    save_output: bool = False
