"""What ran: implementations that one step called, and graphs that torch.compile made.

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
from torch import nn

from decomp_kernels.bench.engine import Contender
from decomp_kernels.ops import decomposed_linear as operator
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
        self._replaced.append((operator, "autograd_node", operator.autograd_node))
        operator.autograd_node = self._compiled(operator.autograd_node)
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

    def _compiled(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        """``choose`` of ops/autograd_node.py, whose node says when it runs, and what each way."""

        def chosen(*args: Any) -> Any:
            found = choose(*args)
            if found is None:
                return None
            node, passes = found

            def ran(direction: str, bit: int) -> None:
                impl = "native:passes" if passes & bit else "aten"
                self.calls[OPERATOR, direction, impl + ONE_CALL] += 1

            def counted(*terms: Any) -> torch.Tensor:
                ran("forward", FORWARD_BY_PASSES)
                y = node(*terms)
                if y.grad_fn is not None:
                    y.grad_fn.register_prehook(lambda grads: ran("backward", BACKWARD_BY_PASSES))
                return y

            return counted, passes

        return chosen

    def path(self) -> str:
        """The implementation of the decomposed linear: both names where forward and backward
        differ, empty where it did not run.
        """
        ways = []
        for direction in ("forward", "backward"):
            found = {impl for op, what, impl in self.calls if (op, what) == (OPERATOR, direction)}
            if found:
                ways.append(" and ".join(sorted(found)))
        return ways[0] if len(set(ways)) == 1 else ", ".join(ways)

    def lines(self) -> list[str]:
        """Every call: "row_norm forward: native, 1"."""
        return [f"{op} {what}: {impl}, {n}" for (op, what, impl), n in sorted(self.calls.items())]


def implementation(path: str) -> str:
    """``path`` by the names that ``explain`` and ``impl=`` have."""
    return path.replace(ONE_CALL, "")


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


class Compiled(nn.Module):
    """A module under torch.compile with Inductor: called like it, and counting.

    As one graph where that can be; else with the breaks that the compiler found.  ``graphs`` goes
    up with each graph that is made, so that a later look shows whether it was compiled anew, and
    stays 0 where the module ran as it is.  After eight compilations of one forward, of whatever
    modules, PyTorch goes on without: ``forget`` before each row.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.graphs = self.seen = self.breaks = 0  # seen: the graphs after ``prepare``
        self._run = torch.compile(module, backend=self._backend, fullgraph=True)

    @staticmethod
    def forget() -> None:
        """Drop what was compiled, of every module: those that still run are compiled anew."""
        torch._dynamo.reset()

    def _backend(self, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs, **kwargs)

    def forward(self, x: torch.Tensor) -> Any:
        return self._run(x)

    def prepare(self, contender: Contender) -> None:
        """Compile, forward and backward, by a step of the contender that calls this."""
        from torch._dynamo.exc import Unsupported
        from torch._dynamo.utils import counters

        contender.reset()
        try:
            contender.backward(contender.forward())
        except Unsupported:
            self.graphs = 0
            counters["graph_break"].clear()
            self._run = torch.compile(self.module, backend=self._backend)
            contender.backward(contender.forward())
            self.breaks = sum(counters["graph_break"].values())
        contender.reset()
        self.seen = self.graphs

    def path(self) -> str:
        """What the compiler made of it, and whether it was compiled again since ``prepare``."""
        if not self.graphs:
            return "eager: torch.compile made no graph"
        made = f"{self.seen} graph{'' if self.seen == 1 else 's'}, {self.breaks} breaks"
        again = self.graphs - self.seen
        return f"compiled: {made}" + (
            f", compiled again {again} times while timed" if again else ""
        )
