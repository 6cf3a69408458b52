"""The module that computes an operator on a tensor, of those that have the same two functions."""

from importlib import import_module
from typing import Any

from torch import Tensor

from decomp_kernels import dispatch


def implementation(x: Tensor, impl: str, reference: Any, aten: Any, triton: str) -> Any:
    """``reference``, ``aten`` or kernels/triton/<triton>.py, which alone imports Triton."""
    chosen = dispatch.choose(x, impl, has=dispatch.IMPLS)
    if chosen.startswith("triton:"):
        return import_module(f"decomp_kernels.kernels.triton.{triton}")
    return reference if chosen == "reference" else aten
