"""Several decomposed linears of one x (q, k and v), the definition.

    y_i = decomposed_linear(x; layer i)        dx = sum_i dx_i

All else is reference/decomposed_linear.py's, layer by layer; no layer has an addend, and no base
weight a gradient.  dx is summed before it is rounded.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from decomp_kernels.reference import decomposed_linear
from decomp_kernels.reference.decomposed_linear import Gradients


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    core: Tensor | None
    in_scale: Tensor | None
    out_scale: Tensor | None
    seed: Tensor | None
    scale: float
    dropout: float
    activation: str

    @property
    def dropping(self) -> bool:
        return self.dropout > 0.0 and self.seed is not None


def forward(
    x: Tensor, layers: Sequence[Layer]
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """y, t and z of each layer."""
    return [decomposed_linear.forward(x, *layer[:7], None, *layer[7:], True) for layer in layers]


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    layers: Sequence[Layer],
    ts: Sequence[Tensor | None],
    zs: Sequence[Tensor | None],
    needs: Sequence[Gradients],
) -> tuple[Tensor | None, list[Gradients]]:
    """dx, and the gradients that each of ``needs`` asks for; all or none ask for x's.

    In the list, x's place is empty.  ts and zs as for a single layer.
    """
    d_x, found = None, []
    for dy, layer, t, z, need in zip(dys, layers, ts, zs, needs, strict=True):
        grads = decomposed_linear.backward(dy, x, *layer[:7], t, z, *layer[7:], need)
        if grads.x is not None:
            d_x = grads.x if d_x is None else d_x + grads.x
        found.append(grads._replace(x=None))
    return d_x, found
