"""Which implementation runs.  The only file that asks what machine this is."""

import os
from collections.abc import Container
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

EVERYWHERE = ("reference", "aten")  # what every operator has
TRITON_FORMS = ("triton:passes",)  # an operator with a single form has that under every name
IMPLS = ("auto", *EVERYWHERE, *TRITON_FORMS)
VARIABLE = "DECOMP_KERNELS_IMPL"
INTERPRET = "TRITON_INTERPRET"


def choose(x: Tensor, impl: str = "auto", has: Container[str] = EVERYWHERE) -> str:
    """The implementation for an operator on ``x``: ``impl`` itself, or what ``auto`` stands for.

    ``auto`` takes the environment variable DECOMP_KERNELS_IMPL where it is set, and else the
    composition of library calls, which runs on every device.  It never takes Triton by itself:
    nobody has measured where that is faster.  has: the implementations of this operator.  A named
    one is never replaced: RuntimeError where it cannot run on ``x`` or the operator has none.
    """
    impl = named(impl)
    if impl == "auto":
        return "aten"
    why = why_not(x, impl) if impl in has else "this operator has no such implementation yet"
    if why:
        raise RuntimeError(f"impl={impl!r} cannot run: {why}; use impl='aten' or impl='auto'")
    return impl


def named(impl: str) -> str:
    """``impl``, or the environment variable's in place of ``auto``."""
    check(impl)
    if impl == "auto":
        impl = os.environ.get(VARIABLE, "auto")
        check(impl, f"the environment variable {VARIABLE}")
    return impl


def check(impl: str, where: str = "impl") -> None:
    if impl not in IMPLS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLS)}, got {impl!r}")


def why_not(x: Tensor, impl: str) -> str | None:
    """Why ``impl`` cannot run on ``x``; None where it can."""
    if impl in EVERYWHERE:
        return None
    if why := why_not_installed():
        return why
    if x.dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, and x is float64"
    if x.device.type == "cpu" and os.environ.get(INTERPRET) != "1":
        return (
            f"x is on the CPU, where Triton runs only as an interpreter (set {INTERPRET}=1 before "
            "the first import of triton)"
        )
    if x.device.type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA and ROCm devices, and x is on {x.device}"
    return None


def architecture(device: torch.device) -> str:
    """Of a GPU, as compilers name it: "sm_90", "gfx942"; "any" of everything else."""
    return _gpu_architecture(device) if device.type == "cuda" else "any"


@cache
def _gpu_architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def why_not_installed() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def base_gemm_first(x: Tensor) -> bool:
    """Whether a GEMM that adds to a filled buffer is slower than one that fills an empty one.

    16-bit on a CPU it is, by 1 % (docs/performance.md): there a low-rank term is better added after
    the base GEMM.  On a GPU the read of the buffer hides under the arithmetic.
    """
    return x.device.type == "cpu" and x.element_size() == 2
