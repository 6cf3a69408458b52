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


def base_gemm_first(x: Tensor) -> bool:
    """Whether a GEMM that adds to a filled buffer is slower than one that fills an empty one.

    16-bit on a CPU it is, by 1 % (docs/performance.md): there a low-rank term is better added after
    the base GEMM.  On a GPU the read of the buffer hides under the arithmetic.
    """
    return x.device.type == "cpu" and x.element_size() == 2
