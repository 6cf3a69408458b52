"""Sparse updates at fixed places (SHiRA, Bhardwaj et al. 2024, arXiv:2406.13175).

    W' = W, and W'[rows_j, cols_j] += values_j        rows, cols int64 [n], buffers
    values [n] zeros, so the start is exact

The places are drawn at random, are those of the largest |W|, or are given with ``set_mask``; the
last is also how the trained state of Diff pruning goes on as a sparse update.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors, Scatter
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor

MASKS = ("random", "magnitude")


@method("sparse")
class Sparse(Method):
    """mask: "random", or "magnitude" for the largest |W|.  density: the share of W's entries that
    are trained, 0.01 by default; or r: as many as LoRA of that rank trains, r (N + K).
    """

    formula = "W + scatter(values)"
    citation = "arXiv:2406.13175"
    trains = "density N K, or r (N + K)"
    peft_form = PeftForm(
        "ShiraConfig",
        "SHIRA",
        tensors={
            "values": PeftTensor("shira_weight.*"),
            "rows": PeftTensor("shira_indices.*", "first"),
            "cols": PeftTensor("shira_indices.*", "second"),
        },
        options={"r": "r"},
        ours={"mask": "random"},
        note='with mask="random" and r',
    )
    impls = dispatch.NOT_NATIVE
    aliases = {"mask_type": "mask"}

    mask: str = "random"
    density: float | None = None
    r: int | None = None

    def check_options(self) -> None:
        super().check_options()
        if self.mask not in MASKS:
            raise ValueError(
                f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}; other places are "
                "given after adapting, with set_mask"
            )
        if self.density is not None and self.r is not None:
            raise ValueError("density and r both say how many entries train: give one of them")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        super().check_shape(out_features, in_features, name)
        count, total = self.count(out_features, in_features), out_features * in_features
        if count > total:
            raise ValueError(
                f"r = {self.r} asks for {count} entries of {name or 'this layer'}, which has "
                f"{out_features} * {in_features} = {total}; lower r or give a density"
            )

    def count(self, out_features: int, in_features: int) -> int:
        """The number of entries that train."""
        if self.r is not None:
            return self.r * (out_features + in_features)
        density = 0.01 if self.density is None else self.density
        return max(1, round(density * out_features * in_features))

    def create(self, adapter: Adapter, base: Base) -> None:
        N, K = base.out_features, base.in_features
        if self.mask == "magnitude":
            places = largest(base.dense(base.weight.dtype).detach(), self.count(N, K))
        else:
            places = torch.randperm(N * K, device=base.weight.device)[: self.count(N, K)]
        places = places.sort().values
        adapter.register_buffer("rows", places // K)
        adapter.register_buffer("cols", places % K)
        adapter.values = base.matrix(len(places))

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(weight_map=Scatter(adapter.rows, adapter.cols, adapter.values))

    def check_values(self, adapter: Adapter, base: Base) -> None:
        _checked_order(adapter.rows, adapter.cols, (base.out_features, base.in_features))

    @torch.no_grad()
    def set_mask(
        self,
        adapter: Adapter,
        shape: tuple[int, int],
        rows: Tensor,
        cols: Tensor,
        values: Tensor | None = None,
    ) -> None:
        """Train these places of a weight of ``shape`` [N, K] instead; in place.

        rows, cols: integers, one pair for each trained value and no pair twice.  values: their
        start, or zeros.  Raises ValueError, with nothing changed, where they do not fit.
        """
        rows, cols = (t.to(adapter.rows.device, torch.int64) for t in (rows, cols))
        count = len(adapter.values)
        if rows.shape != (count,) or cols.shape != (count,):
            raise ValueError(
                f"rows and cols must hold one place for each of the {count} values, got "
                f"{tuple(rows.shape)} and {tuple(cols.shape)}; set density or r to have another "
                "number"
            )
        order = _checked_order(rows, cols, shape)
        if values is not None and values.shape != (count,):
            raise ValueError(f"values must have shape ({count},), got {tuple(values.shape)}")
        adapter.rows.copy_(rows[order])
        adapter.cols.copy_(cols[order])
        if values is None:
            adapter.values.zero_()
        else:
            adapter.values.copy_(values.to(order.device)[order])


def _checked_order(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    """The order that sorts the places; ValueError where one is no place of the weight, or twice."""
    N, K = shape
    for name, places, size in (("rows", rows, N), ("cols", cols, K)):
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
            raise ValueError(f"{name} must be from 0 to {size - 1} for a weight {(N, K)}")
    flat, order = (rows * K + cols).sort()
    if bool((flat[1:] == flat[:-1]).any()):
        raise ValueError("rows and cols must name no place twice")
    return order


def largest(matrix: Tensor, count: int) -> Tensor:
    """The flat places of the ``count`` entries of largest magnitude."""
    return matrix.abs().flatten().topk(count, sorted=False).indices
