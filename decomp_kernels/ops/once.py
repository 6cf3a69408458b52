"""Backward functions that are differentiated once: a second time raises an error, always.

Torch's own decorator lets a second derivative pass as zero, without a word, where the incoming
gradient needs none itself (the sum of an output, a loss) but tensors kept from forward do.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable as torchs


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's ``backward(ctx, *grads)``, under @staticmethod."""
    refusing = torchs(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = tuple(
                grad if grad is None or grad.requires_grad else grad.detach().requires_grad_()
                for grad in grads
            )
        return refusing(ctx, *grads)

    return wrapper
