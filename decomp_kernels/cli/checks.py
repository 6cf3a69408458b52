"""What is saved is what was trained, and merging changes nothing: checked on held-out rows.

    reloaded   a fresh base model with the saved adapter, against the trained model
    merged     the trained model with its adapters in its weights, against itself unmerged

The tolerance is not chosen: two computations of one function may each be twice as far from the
exact one as the frozen base model in its own dtype is from itself in a wider one (float64 for
float32, float32 for half precision), so they may differ by four times that.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench.twins import method_of, twin
from decomp_kernels.cli.tasks import Task

ROWS = 16


@dataclass
class Agreement:
    """Largest absolute differences of the outputs, and what they may be."""

    moved: float  # what the adapter changes at all: the differences are to be read against it
    reloaded: float
    merged: float | None  # None where the method cannot be merged
    why_not_merged: str | None
    tolerance: float

    @property
    def holds(self) -> bool:
        found = [self.reloaded, *([] if self.merged is None else [self.merged])]
        return all(difference <= self.tolerance for difference in found)

    def line(self, label: str) -> str:
        merged = f"not mergeable: {self.why_not_merged}"
        if self.merged is not None:
            merged = f"merged {self.merged:.1e}"
        return (
            f"{label}: outputs differ from the trained model's by: reloaded {self.reloaded:.1e}, "
            f"{merged}; allowed {self.tolerance:.1e}; the adapter moves them by {self.moved:.1e}"
        )


def rounding(base: nn.Module, task: Task) -> float:
    """max |f(x) - f_wide(x)| of the frozen base model."""
    wide = {torch.float32: torch.float64}.get(next(base.parameters()).dtype, torch.float32)
    exact = task.outputs(copy.deepcopy(base).eval().to(wide), ROWS).double()
    return (task.outputs(base.eval(), ROWS).double() - exact).abs().max().item()


def agreement(
    model: nn.Module,
    base: nn.Module,
    fresh: Callable[[], nn.Module],
    task: Task,
    folder: Path,
    error_of_base: float,
) -> Agreement:
    """``folder`` holds the adapter of ``model``; ``fresh`` loads the base model anew."""
    trained = task.outputs(model.eval(), ROWS)
    moved = _difference(trained, task.outputs(base.eval(), ROWS))
    reloaded = _difference(trained, task.outputs(dk.load_adapter(fresh(), folder).eval(), ROWS))
    why_not = method_of(model).why_not_mergeable
    merged = None
    if why_not is None:
        merged = _difference(trained, task.outputs(dk.merge(twin(model)), ROWS))
    return Agreement(moved, reloaded, merged, why_not, 4 * error_of_base)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()
