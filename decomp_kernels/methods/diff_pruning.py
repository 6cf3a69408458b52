"""Diff pruning (Guo, Rush, Kim 2020, arXiv:2012.07463): a sparse change whose places are learned.

    W' = W + z * delta        z in [0, 1]: hard concrete (Louizos et al. 2018, arXiv:1712.01312)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)      gamma, zeta = -1.5, 1.5
    s = sigmoid(log u - log(1 - u) + log_alpha)    u ~ U(0, 1) in training, 1/2 otherwise
    delta [N, K] zeros, so the start is exact        log_alpha [N, K] = alpha_init

The training phase is dense: it trains two numbers for each weight and costs what full fine-tuning
does.  ``l0_penalty`` is the expected number of changed weights, to be added to the loss times a
small factor; ``fix_masks`` then keeps the largest changes as the Sparse method, which is what is
saved, merged or trained further.
"""

import math
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.methods.sparse import Sparse, largest
from decomp_kernels.quantized_weight import QuantizedWeight

GAMMA, ZETA = -1.5, 1.5


@method("diff_pruning")
class DiffPruning(Method):
    """alpha_init: start of log_alpha; 5 leaves nearly every z at 1."""

    formula = "W + z * delta"
    citation = "arXiv:2012.07463"
    trains = "2 N K, until the mask is fixed"

    alpha_init: float = 5.0

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.delta = base.matrix(*base.weight.shape)
        adapter.log_alpha = base.matrix(*base.weight.shape, fill=self.alpha_init)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return _factors(adapter, base, mask(adapter))

    def forward(self, adapter: Adapter, base: Base, x: Tensor, training: bool) -> Tensor:
        if isinstance(base.weight, QuantizedWeight):  # multiplied in x's dtype
            base = base._replace(weight=replace(base.weight, dtype=x.dtype))
        if not training:
            return super().forward(adapter, base, x, training)
        return self.apply(_factors(adapter, base, sampled_mask(adapter)), base, x)


def mask(adapter: Adapter) -> Tensor:
    """z [N, K] without its noise, float32 or wider."""
    return _stretched(_wide(adapter.log_alpha))


def sampled_mask(adapter: Adapter) -> Tensor:
    """z [N, K] drawn with torch's generator, float32 or wider."""
    log_alpha = _wide(adapter.log_alpha)
    noise = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    return _stretched(noise.logit() + log_alpha)


def l0_penalty(model: nn.Module) -> Tensor:
    """The expected number of nonzero z over all Diff pruning adapters of ``model`` that train.

    sum P(z != 0) = sum sigmoid(log_alpha - log(-gamma / zeta)); differentiable.
    """
    shift = math.log(-GAMMA / ZETA)
    terms = [
        torch.sigmoid(_wide(adapter.log_alpha) - shift).sum()
        for adapter in model.modules()
        if _prunes(adapter) and adapter.log_alpha.requires_grad
    ]
    if not terms:
        raise ValueError(
            "l0_penalty needs a model with Diff pruning adapters in training, and found none; "
            "adapt it with DiffPruning() first"
        )
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def fix_masks(model: nn.Module, *, density: float | None = None, r: int | None = None) -> nn.Module:
    """Turn every Diff pruning adapter of ``model`` into a Sparse one, in place; returns ``model``.

    The largest |z * delta| stay, as many as Sparse(density=..., r=...) trains, with their values.
    """
    for holder in list(model.modules()):
        for name, adapter in list(holder.named_children()):
            if _prunes(adapter):
                options: dict[str, Any] = {"density": density, "r": r, "impl": adapter.method.impl}
                setattr(holder, name, fixed(adapter, Sparse(**options)))
    return model


@torch.no_grad()
def fixed(adapter: Adapter, method: Sparse) -> Adapter:
    """A Sparse adapter with the largest changes of a Diff pruning one."""
    N, K = adapter.delta.shape
    method.check_shape(N, K, "")
    change = mask(adapter) * adapter.delta
    places = largest(change, method.count(N, K)).sort().values
    made = Adapter(method)
    made.register_buffer("rows", places // K)
    made.register_buffer("cols", places % K)
    values = change.flatten()[places].to(adapter.delta.dtype)
    made.values = nn.Parameter(values, requires_grad=adapter.delta.requires_grad)
    made.initialized = adapter.initialized
    return made.train(adapter.training)


def _prunes(module: nn.Module) -> TypeGuard[Adapter]:
    return isinstance(module, Adapter) and isinstance(module.method, DiffPruning)


def _factors(adapter: Adapter, base: Base, z: Tensor) -> Factors:
    changed = base.dense(z.dtype) + z * adapter.delta
    return Factors(weight=changed.to(base.weight.dtype))


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
