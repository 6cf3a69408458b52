"""Which implementation runs.  The only file that asks what machine this is."""

import os

from torch import Tensor

IMPLS = ("auto", "reference", "aten")
VARIABLE = "DECOMP_KERNELS_IMPL"


def choose(x: Tensor, impl: str = "auto") -> str:
    """The implementation for an operator on ``x``: ``impl`` itself, or what ``auto`` stands for.

    ``auto`` takes the environment variable DECOMP_KERNELS_IMPL where it is set, and else the
    composition of library calls, which runs on every device.  A named one is never replaced.
    """
    check(impl)
    if impl == "auto":
        impl = os.environ.get(VARIABLE, "auto")
        check(impl, f"the environment variable {VARIABLE}")
    return "aten" if impl == "auto" else impl


def check(impl: str, where: str = "impl") -> None:
    if impl not in IMPLS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLS)}, got {impl!r}")
