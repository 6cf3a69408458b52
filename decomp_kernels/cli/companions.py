"""What some methods need beside an optimizer, step by step.

AdaLoRA     its rank allocator after each step, and its orthogonality term in the loss
LoRA-Dash   one choice of directions, after a fifth of the steps
--mpc       the paper's pattern constraint in the loss, for every method with A and B
"""

from typing import Any

from torch import Tensor, nn

from decomp_kernels.bench.twins import method_of
from decomp_kernels.cli.errors import BadInput, one_line
from decomp_kernels.constraints import mpc_loss
from decomp_kernels.methods import diff_pruning, lora_dash
from decomp_kernels.methods.adalora import AdaLoRA, RankAllocator

L0_WEIGHT = 1.25e-7  # per weight, of arXiv:2012.07463's experiments


class Companion:
    """mpc: the constraint's kind, "o" or "d", or None; coef: its weight in the loss."""

    def __init__(self, model: nn.Module, mpc: str | None = None, coef: float = 0.0) -> None:
        self.model, self.mpc, self.coef = model, mpc, coef
        try:
            self.loss()
        except ValueError as error:
            raise BadInput(f"--mpc: {one_line(error)}") from None

    def loss(self) -> Tensor | None:
        """A term to add to the task's loss."""
        return None if self.mpc is None else mpc_loss(self.model, self.mpc, self.coef)

    def after(self, step: int) -> None:
        """Called with ``step`` optimizer steps taken, before the gradients are dropped."""

    def finish(self) -> None:
        """Called once, after the last step and before the model is measured and saved."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"it has {next(iter(state))!r}, which this method does not know")


class Ranks(Companion):
    def __init__(self, model: nn.Module, mpc: str | None, coef: float, steps: int) -> None:
        method: Any = method_of(model)
        self.weight = method.orth_reg_weight
        super().__init__(model, mpc, coef)
        try:
            self.allocator = RankAllocator(method, steps)
        except ValueError as error:
            raise BadInput(f"method adalora: {one_line(error)}") from None

    def loss(self) -> Tensor | None:
        own = mpc_loss(self.model, "o", self.weight, squared=False, reduction="mean_over_matrices")
        asked = super().loss()
        return own if asked is None else own + asked

    def after(self, step: int) -> None:
        self.allocator.step(self.model, step)

    def state(self) -> dict[str, Tensor]:
        return self.allocator.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.allocator.load_state_dict(state)


class Directions(Companion):
    def __init__(self, model: nn.Module, mpc: str | None, coef: float, steps: int) -> None:
        super().__init__(model, mpc, coef)
        self.at = max(1, steps // 5)

    def after(self, step: int) -> None:
        if step == self.at:
            lora_dash.select_directions(self.model)


class Masks(Companion):
    def loss(self) -> Tensor | None:
        own = L0_WEIGHT * diff_pruning.l0_penalty(self.model)
        asked = super().loss()
        return own if asked is None else own + asked

    def finish(self) -> None:
        diff_pruning.fix_masks(self.model)


def companion(model: nn.Module, mpc: str | None, coef: float, steps: int) -> Companion:
    """The companion of the method that ``model`` is adapted with, for so many steps."""
    method = method_of(model)
    if isinstance(method, AdaLoRA):
        return Ranks(model, mpc, coef, steps)
    if isinstance(method, lora_dash.LoRADash):
        return Directions(model, mpc, coef, steps)
    if isinstance(method, diff_pruning.DiffPruning):
        return Masks(model, mpc, coef)
    return Companion(model, mpc, coef)
