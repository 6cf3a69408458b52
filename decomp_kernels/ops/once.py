"""Backward functions that are differentiated once: a second time raises an error, always.

Torch's own decorator lets a second derivative pass as zero, without a word, where the incoming
gradient needs none itself (the sum of an output, a loss) but tensors kept from forward do.  And
``torch.autograd.grad`` runs only what leads to the tensors it is asked for, so that what refuses
must lead to them, or it is left out and the rest of the sum is taken for the whole.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as torchs


class _Refuses(torch.autograd.Function):
    """The first ``count`` tensors as they are, with a graph that leads to all and raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "trying to differentiate twice a function of decomp_kernels, which has first "
            "derivatives alone; take gradients of gradients on the model without it"
        )


class _Noting:
    """A Function's ctx that notes the saved tensors: checkpointing lets them be read only once."""

    def __init__(self, ctx: Any) -> None:
        self.ctx = ctx
        self.noted: tuple[Tensor | None, ...] = ()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.ctx, name)
        if name == "saved_tensors":
            self.noted = value
        return value


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's ``backward(ctx, *grads)``, under @staticmethod."""
    plain = torchs(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return plain(ctx, *grads)
        noting = _Noting(ctx)  # create_graph=True
        with torch.no_grad():
            result = backward(noting, *grads)
        leaves = [getattr(node, "variable", None) for node, _ in ctx.next_functions]
        sources = [*grads, *noting.noted, *leaves, torch.empty(0, requires_grad=True)]
        several = isinstance(result, tuple)
        linked = _linked(result if several else (result,), sources)
        return linked if several else linked[0]

    return wrapper


def _linked(results: tuple[Any, ...], sources: list[Tensor | None]) -> tuple[Any, ...]:
    """The results, of which each tensor has a graph that leads to the sources and raises."""
    made = [one for one in results if isinstance(one, Tensor)]
    present = [one for one in sources if one is not None]
    refusing = iter(_Refuses.apply(len(made), *made, *present) if made else ())
    return tuple(next(refusing) if isinstance(one, Tensor) else one for one in results)
