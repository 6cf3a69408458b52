"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): low rank with a budget that moves between layers.

    W' = W + s B diag(e) A        s = alpha / (r + 1e-5), kept when ranks are masked
    A [r, K], B [N, r] normal with deviation 0.02        e = core [r] zeros, so the start is exact

``RankAllocator`` decides which of the triplets (A_i, e_i, B_i) of all layers stay:

    I = |w dw|
    mean = beta1 mean + (1 - beta1) I        spread = beta2 spread + (1 - beta2) |I - mean|
    score(i) = q(e_i) + mean_k q(A_ik) + mean_j q(B_ji),   q = mean * spread        (eq. 7 to 11)
    budget(t) = b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tinit - tfinal))^3        (eq. 12)

The b_0 triplets of the start shrink to b_T = target_r a layer: every deltaT steps the lowest
scores have e set to 0.  They are trained on and may come back, until the last tfinal steps, where
one mask holds.  AdaLoRA's orthogonality term, weighted by orth_reg_weight, is MPC_o of
arXiv:2407.05417: ``decomp_kernels.constraints``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method
from decomp_kernels.peft_form import PeftForm, PeftTensor

_TRIPLET = ("down", "core", "up")


@method("adalora")
class AdaLoRA(LowRank):
    """r (also init_r): rank at the start.  target_r: its mean over the layers at the end.

    tinit, tfinal: steps before and after the ranks shrink; deltaT: steps between two masks; beta1,
    beta2: of the moving averages.  orth_reg_weight: for the caller of the orthogonality term.
    """

    formula = "W + s B diag(e) A"
    citation = "arXiv:2303.10512"
    trains = "r (N + K) + r"
    peft_form = PeftForm(
        "AdaLoraConfig",
        "ADALORA",
        tensors={
            "down": PeftTensor("lora_A.*"),
            "up": PeftTensor("lora_B.*"),
            "core": PeftTensor("lora_E.*", "column"),
        },
        options={
            "r": "init_r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            **{
                name: name
                for name in (
                    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"
                )
            },
        },
        bias_only="lora_only",
        conv1d=True,
    )  # fmt: skip
    aliases = {"init_r": "r"}

    r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    @classmethod
    def small(cls) -> "AdaLoRA":
        return cls(r=4, target_r=2)

    @property
    def scale(self) -> float:
        return self.alpha / (self.r + 1e-5)

    def check_options(self) -> None:
        super().check_options()
        if self.use_rslora:
            raise ValueError("use_rslora must be False: AdaLoRA's scale is alpha / (r + 1e-5)")
        for option, lowest in (("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("orth_reg_weight", 0)):
            if getattr(self, option) < lowest:
                raise ValueError(f"{option} must be at least {lowest}, got {getattr(self, option)}")
        for option in ("beta1", "beta2"):
            if not 0.0 < getattr(self, option) < 1.0:
                raise ValueError(f"{option} must be between 0 and 1, got {getattr(self, option)}")

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.normal(self.r, base.in_features, std=0.02)
        adapter.up = base.normal(base.out_features, self.r, std=0.02)
        adapter.core = base.scales(self.r, fill=0.0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down,
            up=adapter.up,
            core=adapter.core,
            scale=self.scale,
            activation=self.activation,
        )


class RankAllocator:
    """Moves the rank budget between the AdaLoRA adapters of a model.

    method gives the schedule; total_step is T.  Every optimizer step:

        loss.backward(); optimizer.step(); allocator.step(model, step); optimizer.zero_grad()

    with step = the optimizer steps taken so far: 1 after the first, T after the last.
    """

    def __init__(self, method: AdaLoRA, total_step: int) -> None:
        if not isinstance(method, AdaLoRA):
            raise TypeError(f"method must be an AdaLoRA instance, got {method!r}")
        if method.target_r >= method.r:
            raise ValueError(
                f"target_r must be below r = {method.r}, or no rank can shrink, got "
                f"{method.target_r}"
            )
        if total_step <= method.tinit + method.tfinal:
            raise ValueError(
                f"total_step must be above tinit + tfinal = {method.tinit + method.tfinal}, or no "
                f"step is left in which ranks can shrink, got {total_step}; lower tinit or tfinal"
            )
        self.method, self.total_step = method, total_step
        self.final = False  # the mask is settled: it is put on after each step, and nothing else
        self.mean: dict[str, Tensor] = {}  # smoothed importance, by "<adapter's path>.<tensor>"
        self.spread: dict[str, Tensor] = {}  # smoothed distance of the importance from it
        self.masks: dict[str, Tensor] = {}  # bool [r], True where kept, by adapter's path

    def budget(self, step: int, start: int, target: int) -> int:
        """How many of the ``start`` triplets are kept after this step."""
        method = self.method
        if step <= method.tinit:
            return start
        if step >= self.total_step - method.tfinal:
            return target
        shrinking = self.total_step - method.tinit - method.tfinal
        left = 1 - (step - method.tinit) / shrinking
        return int((start - target) * left**3 + target)

    @torch.no_grad()
    def step(self, model: nn.Module | Iterable[nn.Module], step: int) -> int:
        """Take in this step's gradients and, where the schedule says so, mask.  Returns the budget.

        model: a module that holds the adapters anywhere, or several such.
        """
        adapters = _trained_adapters(model)
        start = sum(adapter.method.r for adapter in adapters.values())
        budget = self.budget(step, start, min(self.method.target_r * len(adapters), start))
        if self.final:
            self._apply(adapters)
        elif step >= self.total_step - self.method.tfinal:
            self._choose(adapters, budget)
            self._apply(adapters)
            self.final = True
            self.mean, self.spread = {}, {}
        else:
            self._observe(adapters)
            if step % self.method.deltaT == 0:
                self._choose(adapters, budget)
                self._apply(adapters)
        return budget

    def ranks(self) -> dict[str, int]:
        """The rank that each adapter kept at the last masking, by its path in the model."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        state = {"final": torch.tensor(self.final)}
        for kind in ("mean", "spread", "masks"):
            state |= {f"{kind}/{name}": value for name, value in getattr(self, kind).items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a ``state_dict()``; its tensors may be on any device."""
        loaded: dict[str, dict[str, Tensor]] = {"mean": {}, "spread": {}, "masks": {}}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if key == "final":
                continue
            if kind not in loaded or not name or not isinstance(value, Tensor):
                raise ValueError(
                    f"a RankAllocator's state has keys final, mean/..., spread/... and masks/..., "
                    f"got {key!r}; give what state_dict() returned"
                )
            loaded[kind][name] = value.clone()
        if "final" not in state:
            raise ValueError("the state of a RankAllocator must have 'final'; it was cut short")
        self.final = bool(state["final"])
        self.mean, self.spread, self.masks = loaded["mean"], loaded["spread"], loaded["masks"]

    def _observe(self, adapters: dict[str, Any]) -> None:
        """Smooth the importance |w dw| and its spread."""
        if all(adapter.core.grad is None for adapter in adapters.values()):
            raise ValueError(
                "the AdaLoRA adapters hold no gradient; call RankAllocator.step after "
                "optimizer.step() and before optimizer.zero_grad()"
            )
        for path, adapter in adapters.items():
            for name in _TRIPLET:
                weight = getattr(adapter, name)
                wide = torch.promote_types(weight.dtype, torch.float32)
                zeros = torch.zeros_like(weight, dtype=wide)
                # A layer that took no part in this step has no gradient: importance 0.
                grad = zeros if weight.grad is None else weight.grad.to(wide)
                now = (weight.to(wide) * grad).abs_()
                key = f"{path}.{name}"
                self.mean.setdefault(key, zeros)
                self.spread.setdefault(key, torch.zeros_like(zeros))
                mean, spread = self._stored(key, weight)
                mean.mul_(self.method.beta1).add_(now, alpha=1 - self.method.beta1)
                distance = now.sub_(mean).abs_()
                spread.mul_(self.method.beta2).add_(distance, alpha=1 - self.method.beta2)

    def _choose(self, adapters: dict[str, Any], budget: int) -> None:
        """Keep the ``budget`` triplets with the highest scores among all layers."""
        scores = [self._scores(path, adapter) for path, adapter in adapters.items()]
        kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=scores[0].device)
        together = torch.cat([score.to(kept.device) for score in scores])
        kept[together.topk(budget).indices] = True
        parts = kept.split([len(score) for score in scores])
        self.masks = dict(zip(adapters, parts, strict=True))

    def _scores(self, path: str, adapter: Any) -> Tensor:
        """score(i) of one layer, [r]."""
        q = {}
        for name in _TRIPLET:
            mean, spread = self._stored(f"{path}.{name}", getattr(adapter, name))
            q[name] = mean * spread
        return q["core"] + q["down"].mean(1) + q["up"].mean(0)

    def _apply(self, adapters: dict[str, Any]) -> None:
        missing = [path for path in adapters if path not in self.masks]
        if missing:
            raise ValueError(f"the rank allocator knows no adapter {missing[0]!r}: {_SAME_MODEL}")
        for path, adapter in adapters.items():
            mask = self.masks[path] = self.masks[path].to(adapter.core.device)
            if mask.shape != adapter.core.shape:
                raise ValueError(
                    f"the mask of {path} is for rank {len(mask)}, and its rank is "
                    f"{len(adapter.core)}: {_SAME_MODEL}"
                )
            adapter.core.masked_fill_(~mask, 0.0)

    def _stored(self, key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, spread) of one weight, on its device."""
        if key not in self.mean or key not in self.spread:
            raise ValueError(
                f"the rank allocator has seen no importance of {key}; call its step after every "
                "optimizer step from the first one on, or load its state_dict"
            )
        for store in (self.mean, self.spread):
            if store[key].shape != weight.shape:
                raise ValueError(
                    f"the rank allocator holds {key} with shape {tuple(store[key].shape)}, the "
                    f"model has {tuple(weight.shape)}: {_SAME_MODEL}"
                )
            store[key] = store[key].to(weight.device)
        return self.mean[key], self.spread[key]


_SAME_MODEL = "resume with the model that the allocator's state was saved from"


def _trained_adapters(model: nn.Module | Iterable[nn.Module]) -> dict[str, Any]:
    """The AdaLoRA adapters that are being trained, by their path in the model."""
    several = [] if isinstance(model, nn.Module) else list(model)
    roots = {f"{i}.": root for i, root in enumerate(several)}
    if isinstance(model, nn.Module):
        roots = {"": model}
    found = {
        prefix + name: module
        for prefix, root in roots.items()
        for name, module in root.named_modules()
        if isinstance(module, Adapter) and isinstance(module.method, AdaLoRA)
    }
    trained: dict[str, Any] = {
        name: adapter for name, adapter in found.items() if adapter.core.requires_grad
    }
    if not trained:
        raise ValueError(
            "the model has no AdaLoRA adapter in training; call adapt(model, AdaLoRA()) first"
        )
    return trained
