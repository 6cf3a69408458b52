"""What some methods need beside an optimizer, step by step.

AdaLoRA     its rank allocator after each step, and its orthogonality term in the loss
LoRA-Dash   one choice of directions, after a fifth of the steps
"""

from torch import Tensor, nn

from decomp_kernels.cli.errors import BadInput
from decomp_kernels.methods import lora_dash
from decomp_kernels.methods.adalora import AdaLoRA, RankAllocator
from decomp_kernels.methods.base import Method


class Companion:
    """Nothing to do: what most methods need."""

    def loss(self, model: nn.Module) -> Tensor | None:
        """A term to add to the task's loss."""
        return None

    def after(self, model: nn.Module, step: int) -> None:
        """Called with ``step`` optimizer steps taken, before the gradients are dropped."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


class Ranks(Companion):
    def __init__(self, method: AdaLoRA, steps: int) -> None:
        try:
            self.allocator = RankAllocator(method, steps)
        except ValueError as error:
            raise BadInput(f"method adalora: {error}") from None

    def after(self, model: nn.Module, step: int) -> None:
        self.allocator.step(model, step)

    def state(self) -> dict[str, Tensor]:
        return self.allocator.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.allocator.load_state_dict(state)


class Directions(Companion):
    def __init__(self, steps: int) -> None:
        self.at = max(1, steps // 5)

    def after(self, model: nn.Module, step: int) -> None:
        if step == self.at:
            lora_dash.select_directions(model)


def companion(method: Method, steps: int) -> Companion:
    if isinstance(method, AdaLoRA):
        return Ranks(method, steps)
    if isinstance(method, lora_dash.LoRADash):
        return Directions(steps)
    return Companion()
