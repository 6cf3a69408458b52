"""The module that computes an operator on a tensor, of those that have the same two functions."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from decomp_kernels import dispatch


def files(
    *, triton: str | dict[str, str] | None = None, native: str | dict[str, str] | None = None
) -> dict[str, str]:
    """Form: its file in decomp_kernels/kernels.  One name stands for all forms of its family."""
    made = {}
    for family, forms, names in (
        ("triton", dispatch.TRITON_FORMS, triton),
        ("native", dispatch.NATIVE_FORMS, native),
    ):
        named = dict.fromkeys(forms, names) if isinstance(names, str) else names or {}
        made.update({form: f"{family}.{name}" for form, name in named.items()})
    return made


def implementation(
    x: Tensor,
    impl: str,
    reference: Any,
    aten: Any,
    files: dict[str, str],
    work: Callable[[], dispatch.Work] | None = None,
) -> Any:
    """``reference``, ``aten`` or one of ``files``, which is loaded when it is first used.

    work: what ``auto`` looks up.
    """
    chosen = dispatch.choose(x, impl, has=(*dispatch.EVERYWHERE, *files), work=work)
    if chosen in files:
        return import_module(f"decomp_kernels.kernels.{files[chosen]}")
    return reference if chosen == "reference" else aten


def work(
    operator: str,
    direction: str,
    rows: Tensor,
    weight: Any,
    down: Tensor | None,
    dropout: float = 0.0,
    out_scale: Tensor | None = None,
) -> Callable[[], dispatch.Work]:
    """What ``auto`` looks up for one call, made where it does.

    rows [..., K or N], of the dtype that the weight is multiplied in.
    """

    def made() -> dispatch.Work:
        r = 0 if down is None else down.shape[0]
        M = rows.numel() // max(rows.shape[-1], 1)
        base, adapter = dispatch.dtype_names(rows, rows if down is None else down)
        return dispatch.Work(
            operator, direction, M, weight.numel(), r, base, adapter, dropout > 0.0,
            out_scale is not None,
        )  # fmt: skip

    return made
