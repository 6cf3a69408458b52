"""The methods that ``bench quality`` compares, and what each is made of at a given budget.

    reconstruction   SSL, SSB, IA3 on the key, value and intermediate linears, BitFit on all six of
                     a block: as many parameters as they have, as in the paper
    extension        LoRA, LoRA + MPC_o, MPC_d and MPC_n, TriLoRA, AdaLoRA, FLoRA, DoRA on all six,
                     of the rank whose number of parameters is nearest to that of LoRA at --rank

(The groups and the modules of arXiv:2407.05417, counted back from its parameter columns.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench.twins import twin
from decomp_kernels.cli import options
from decomp_kernels.cli.companions import Companion, companion
from decomp_kernels.cli.errors import BadInput, one_line
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import Method

FROZEN, RECONSTRUCTION, EXTENSION = "frozen", "reconstruction", "extension"
# A transformers encoder's names; "output.dense" is attention's and the block's own.
SCALED = ["key", "value", "intermediate.dense"]
ALL_SIX = ["query", "key", "value", "intermediate.dense", "output.dense"]

LOW_RANK = {
    "lora": "lora", "lora+mpc_o": "lora", "lora+mpc_d": "lora", "lora+mpc_n": "lora",
    "trilora": "trilora", "adalora": "adalora", "flora": "flora", "dora": "dora",
}  # fmt: skip
METHODS = {
    **dict.fromkeys(("ssl", "ssb", "ia3", "bitfit"), RECONSTRUCTION),
    **dict.fromkeys(LOW_RANK, EXTENSION),
}
RATES = {"bitfit": 4e-3}  # others: by the kind of what they train, as `train` has it


@dataclass(frozen=True)
class Arm:
    """One method at one budget.  r: its own rank; budget: LoRA's that it is matched to."""

    label: str
    group: str
    modules: tuple[str, ...] | str
    budget: int | None = None
    r: int | None = None
    trainable: int = 0  # the adapters' parameters, a trained head not counted
    per_mille: float = 0.0

    @property
    def key(self) -> str:
        return self.label if self.budget is None else f"{self.label} r={self.budget}"

    @property
    def name(self) -> str:
        return LOW_RANK.get(self.label, self.label)

    @property
    def mpc(self) -> str | None:
        """The pattern that is a term in the loss; MPC_n is in the forward."""
        return {"lora+mpc_o": "o", "lora+mpc_d": "d"}.get(self.label)

    def rate(self, matrices: float, scales: float) -> float:
        """The middle of the grid of learning rates."""
        return RATES.get(self.label, scales if self.name in options.SCALES else matrices)

    def make(self, steps: int) -> Method:
        """alpha = r, so that the branch is not scaled; AdaLoRA keeps two thirds of its rank."""
        chosen: dict[str, Any] = {}
        if self.r is not None:
            chosen = {"r": self.r, "alpha": float(self.r)}
        if self.label == "lora+mpc_n":
            chosen["activation"] = "relu"
        if self.name == "adalora" and self.r is not None:
            chosen |= {
                "target_r": max(1, round(2 * self.r / 3)),
                "tinit": steps // 10,
                "tfinal": 3 * steps // 10,
            }
        return dk.methods()[self.name](**chosen)

    def adapt(self, model: nn.Module, steps: int, heads: Sequence[str] = ()) -> nn.Module:
        """``model`` with the method put on, in place; heads: modules to train whole."""
        modules = self.modules if isinstance(self.modules, str) else list(self.modules)
        try:
            return dk.adapt(model, self.make(steps), modules, modules_to_save=list(heads) or None)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{self.key}: {one_line(error)}") from None


def companion_of(model: nn.Module, arm: Arm | None, coef: float, steps: int) -> Companion:
    """What the method needs beside an optimizer; arm None is a head on the frozen model."""
    if arm is None:
        return Companion(model)
    try:
        return companion(model, arm.mpc, coef, steps)
    except BadInput as error:
        raise BadInput(f"{arm.key}: {error}") from None


def arms(
    base: nn.Module,
    labels: Sequence[str],
    ranks: Sequence[int],
    steps: int,
    heads: Sequence[str],
    scaled: list[str] | str = SCALED,
    low_rank: list[str] | str = ALL_SIX,
) -> list[Arm]:
    """The arms of these labels, counted on the meta device: what does not fit is refused here."""
    for label in labels:
        if label not in METHODS:
            raise BadInput(f"--methods must be of {', '.join(METHODS)}; got {label!r}")
    skeleton = twin(base).to("meta")
    size = sum(p.numel() for p in base.parameters())
    size -= sum(p.numel() for head in heads for p in base.get_submodule(head).parameters())

    def counted(arm: Arm) -> Arm:
        model = arm.adapt(twin(skeleton), steps, heads)
        companion_of(model, arm, 0.0, steps)
        trainable = sum(
            p.numel()
            for layer in adapted_layers(model).values()
            for p in layer.adapters.parameters()
            if p.requires_grad
        )
        return replace(arm, trainable=trainable, per_mille=1e3 * trainable / size)

    def names(chosen: list[str] | str) -> tuple[str, ...] | str:
        return chosen if isinstance(chosen, str) else tuple(chosen)

    found = [
        counted(Arm(label, RECONSTRUCTION, names(low_rank if label == "bitfit" else scaled)))
        for label in labels
        if METHODS[label] == RECONSTRUCTION
    ]
    for rank in ranks:
        lora = counted(Arm("lora", EXTENSION, names(low_rank), rank, rank))
        for label in labels:
            if METHODS[label] == EXTENSION:
                found.append(_nearest(replace(lora, label=label), lora.trainable, counted))
    return found


def _nearest(arm: Arm, parameters: int, counted: Any) -> Arm:
    """``arm`` with the rank, at most its budget, whose parameters are nearest in number."""
    assert arm.budget is not None
    nearest = counted(replace(arm, r=arm.budget))
    if nearest.trainable <= parameters:
        return nearest
    low, high, rank = 0, arm.budget, arm.budget - 1  # mostly one of two; else by halving
    while low < rank:
        try:
            tried = counted(replace(arm, r=rank))
        except BadInput:  # AdaLoRA cannot shrink a rank of 1
            break
        nearest = min(nearest, tried, key=lambda one: abs(one.trainable - parameters))
        low, high = (rank, high) if tried.trainable <= parameters else (low, rank)
        rank = (low + high) // 2
    return nearest
