"""What ran: the implementations that one step called.

``Observed`` wraps the functions of the kernel modules while it is open, so that a step inside it
says what it called.  Times are taken outside, where nothing is wrapped.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from decomp_kernels import native_library
from decomp_kernels.bench.engine import Contender
from decomp_kernels.ops.autograd_node import BACKWARD_BY_PASSES, FORWARD_BY_PASSES

OPERATOR = "decomposed_linear"
ONE_CALL = " in one call"  # after the implementation whose calls csrc/autograd makes
_FUNCTIONS = ("forward", "backward", "build", "contract", "merged_weight")
_FOLDERS = ("decomp_kernels.reference.", "decomp_kernels.kernels.")


class Observed:
    """A context; afterwards ``calls`` has (operator, function, implementation): how often.

    Of functions that call one another the outermost counts.  Modules that nobody has loaded yet are
    not seen: take a step before.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self._inside = threading.local()  # backward runs in threads of its own on a GPU
        self._replaced: list[tuple[ModuleType, str, Any]] = []

    def __enter__(self) -> "Observed":
        for name, module in list(sys.modules.items()):
            if not name.startswith(_FOLDERS):
                continue
            for function in _FUNCTIONS:
                body: Any = vars(module).get(function)
                made = isinstance(body, functools.partial)  # of another module's function
                if made or getattr(body, "__module__", None) == name:
                    self._replaced.append((module, function, body))
                    setattr(module, function, self._counted(name, function, body))
        # Not the function that asks for it: what compilers have traced is compiled anew if changed.
        self._replaced.append((native_library, "autograd_node", native_library.autograd_node))
        if (node := native_library.autograd_node()) is not None:
            native_library.autograd_node = lambda: self._compiled(node)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        while self._replaced:
            module, function, body = self._replaced.pop()
            setattr(module, function, body)

    def _counted(self, name: str, function: str, body: Callable[..., Any]) -> Callable[..., Any]:
        operator, impl = _named(name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "now", False):
                return body(*args, **kwargs)
            self.calls[operator, function, impl] += 1
            self._inside.now = True
            try:
                return body(*args, **kwargs)
            finally:
                self._inside.now = False

        return counted

    def _compiled(self, node: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled node, which says when it runs, and what each way."""

        def ran(direction: str, by_passes: int) -> None:
            impl = "native:passes" if by_passes else "aten"
            self.calls[OPERATOR, direction, impl + ONE_CALL] += 1

        def counted(*arguments: Any) -> torch.Tensor:
            passes = arguments[-1]
            ran("forward", passes & FORWARD_BY_PASSES)
            y = node(*arguments)
            if y.grad_fn is not None:
                y.grad_fn.register_prehook(lambda _: ran("backward", passes & BACKWARD_BY_PASSES))
            return y

        return counted

    def path(self) -> str:
        """The implementation of the decomposed linear: both names where forward and backward
        differ, empty where it did not run.
        """
        found = [
            {impl for op, what, impl in self.calls if (op, what) == (OPERATOR, direction)}
            for direction in ("forward", "backward")
        ]
        return _written(found)

    def lines(self) -> list[str]:
        """Every call: "row_norm forward: native, 1"."""
        return [f"{op} {what}: {impl}, {n}" for (op, what, impl), n in sorted(self.calls.items())]


def implementation(path: str) -> str:
    """``path`` by the names that ``explain`` and ``impl=`` have."""
    ways = [set(way.replace(ONE_CALL, "").split(" and ")) for way in path.split(", ")]
    return _written(ways)


def _written(ways: list[set[str]]) -> str:
    """Forward and backward, once where they are the same; empty where nothing ran."""
    named = [" and ".join(sorted(way)) for way in ways if way]
    return ", ".join(dict.fromkeys(named))


def _named(module: str) -> tuple[str, str]:
    """(operator, implementation) of a module of reference/ or kernels/."""
    *_, family, operator = module.split(".")
    if family in ("reference", "aten", "kernels"):
        return operator, family
    if operator.startswith(OPERATOR):
        return OPERATOR, f"{family}:{'fused' if operator.endswith('_fused') else 'passes'}"
    return operator, family


def observe(contender: Contender) -> Observed:
    """One step, and a step before it that loads what it needs; gradients are dropped."""
    contender.reset()
    contender.backward(contender.forward())
    contender.reset()
    with Observed() as observed:
        contender.backward(contender.forward())
    contender.reset()
    return observed
