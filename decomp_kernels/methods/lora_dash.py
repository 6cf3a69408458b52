"""LoRA-Dash (Si et al. 2024, arXiv:2409.01035): LoRA, and scales of task-specific directions.

    W' = W + s B A + U diag(d) V^T        as one branch: down = [A; V^T], up = [B, U],
    core = (s, ..., s, d)                 A [r, K]  B [N, r]  U [N, n]  V^T [n, K]  d [n]

U and V^T hold the n pairs of singular vectors of W whose value the warmed-up branch changes most,
|u_i^T (s B A) v_i| / S_i.  They are buffers of one size from the start, zero until
``select_directions`` fills them, with ``selected`` beside them: until then the method is LoRA (d
has no gradient), nothing counts forward calls, and a saved adapter comes back with its directions.

    for step, batch in enumerate(batches):
        if step == 100:                              # the paper's warm-up
            lora_dash.select_directions(model)       # needs no new optimizer: d was there all along
"""

import torch
from torch import nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Holder, LowRank, method


@method("lora_dash")
class LoRADash(LowRank):
    """n_directions: n.  An activation is between every down and up, the directions' included."""

    formula = "W + s B A + U diag(d) V^T"
    citation = "arXiv:2409.01035"
    trains = "r (N + K) + n"

    n_directions: int = 8

    def check_options(self) -> None:
        super().check_options()
        if self.n_directions < 1:
            raise ValueError(f"n_directions must be at least 1, got {self.n_directions}")

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        super().check_shape(out_features, in_features, name)
        if self.n_directions > min(out_features, in_features):
            raise ValueError(
                f"n_directions must be at most min(out_features, in_features) = "
                f"{min(out_features, in_features)} for {name or 'this layer'}, got "
                f"{self.n_directions}; lower it or exclude this module"
            )

    def create(self, adapter: Adapter, base: Base) -> None:
        n, N, K = self.n_directions, base.out_features, base.in_features
        adapter.down = base.kaiming(self.r, K)
        adapter.up = base.matrix(N, self.r)
        adapter.core = base.scales(n, fill=0.0)
        adapter.register_buffer("direction_up", base.matrix(N, n).detach())
        adapter.register_buffer("direction_down", base.matrix(n, K).detach())
        unselected = torch.zeros((), dtype=torch.bool, device=base.weight.device)
        adapter.register_buffer("selected", unselected)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=torch.cat((adapter.down, adapter.direction_down)),
            up=torch.cat((adapter.up, adapter.direction_up), 1),
            core=torch.cat((self.scale * adapter.core.new_ones(self.r), adapter.core)),
            activation=self.activation,
        )

    @torch.no_grad()
    def select_directions(self, adapter: Adapter, base: Base) -> None:
        """Choose U and V from W and the warmed-up A and B, once.  Costs one SVD of W."""
        self._check_ready(adapter, base)
        U, S, Vt = base.svd()
        down, up = adapter.down.to(Vt.dtype), adapter.up.to(U.dtype)
        change = self.scale * ((U.T @ up) * (Vt @ down.T)).sum(1)  # u_i^T (s B A) v_i, no B A
        floor = torch.finfo(S.dtype).tiny  # 0 / 0 would be NaN, which sorts first
        chosen = (change.abs() / S.clamp_min(floor)).topk(self.n_directions).indices
        adapter.direction_up.copy_(U[:, chosen])
        adapter.direction_down.copy_(Vt[chosen])
        adapter.selected.fill_(True)

    def _check_ready(self, adapter: Adapter, base: Base) -> None:
        layer = base.name or "this layer"
        if adapter.selected:
            raise ValueError(
                f"the directions of {layer} are selected already, and core belongs to them; "
                "select them once, after the warm-up, and not again after a resume"
            )
        if not adapter.up.any():
            raise ValueError(
                f"the branch of {layer} changes nothing yet (up is zero), so no direction stands "
                "out; select after warm-up steps, 100 in the paper"
            )


def select_directions(model: nn.Module) -> None:
    """Select the directions of every active LoRA-Dash adapter of ``model``.

    Raises before anything is changed if one of them is selected already or was not trained yet.
    """
    found: list[tuple[LoRADash, Adapter, Base]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Holder) or (adapter := layer.current()) is None:
            continue
        dash = adapter.method
        if not isinstance(dash, LoRADash):
            continue
        if layer.merged:
            raise RuntimeError(f"{name or 'the layer'} is merged; call unmerge(model) first")
        found.append((dash, adapter, layer.base(name, adapter.down.dtype)))
    if not found:
        raise ValueError("the model has no active LoRADash adapter; call adapt(model, LoRADash())")
    for dash, adapter, base in found:
        dash._check_ready(adapter, base)
    for dash, adapter, base in found:
        dash.select_directions(adapter, base)
