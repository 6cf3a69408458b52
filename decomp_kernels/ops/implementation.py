"""The module that computes an operator on a tensor, of those that have the same two functions."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from decomp_kernels import dispatch


def implementation(
    x: Tensor,
    impl: str,
    reference: Any,
    aten: Any,
    triton: str | dict[str, str],
    work: Callable[[], dispatch.Work] | None = None,
) -> Any:
    """``reference``, ``aten`` or a file of kernels/triton, which alone imports Triton.

    triton: the file's name; where the operator has several forms, the name of each.  work: what
    ``auto`` looks up on a GPU.
    """
    files = dict.fromkeys(dispatch.TRITON_FORMS, triton) if isinstance(triton, str) else triton
    chosen = dispatch.choose(x, impl, has=(*dispatch.EVERYWHERE, *files), work=work)
    if chosen in files:
        return import_module(f"decomp_kernels.kernels.triton.{files[chosen]}")
    return reference if chosen == "reference" else aten
