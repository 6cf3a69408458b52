"""How operators meet autocast: which dtype it asks for, and bodies that it must not touch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from decomp_kernels import dispatch


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would run a linear of ``x``, None where it would not."""
    device = x.device.type
    if x.dtype == torch.float64 or not _may_be_on(device):
        return None
    return torch.get_autocast_dtype(device)


def outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's body in the dtypes that it says: autocast would make its GEMMs 16-bit.

    On a GPU that device is the current one inside.
    """

    @wraps(run)
    def body(first: Tensor | list[Tensor], *others: Any) -> Any:
        device = (first[0] if isinstance(first, list) else first).device
        if device.type == "cuda":
            with dispatch.on(device), no_autocast(device):
                return run(first, *others)
        if not _may_be_on(device.type):
            return run(first, *others)
        with torch.autocast(device.type, enabled=False):
            return run(first, *others)

    return body


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Small-tensor work in its own dtypes."""
    on = _may_be_on(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _may_be_on(device: str) -> bool:
    """Autocast does not know the meta device, and raises there."""
    return device != "meta" and torch.is_autocast_enabled(device)
