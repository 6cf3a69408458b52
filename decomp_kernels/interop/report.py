"""What became of each module of a model: adapted, or PEFT's and accelerated, or not and why."""

from torch import nn

from decomp_kernels.interop.peft.accelerate import peft_lines
from decomp_kernels.model import adapted_lines


def report(model: nn.Module) -> str:
    """One line a module: what was adapted with which method, and what was not and why.

    For PEFT's layers: how many eager forwards ran on the fused operator, and how many were PEFT's
    own, by reason.  Compiled forwards are not counted.
    """
    return "\n".join([*adapted_lines(model), *peft_lines(model)]) or "nothing is adapted"
