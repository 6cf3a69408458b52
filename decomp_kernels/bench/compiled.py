"""A model under ``torch.compile``, with what the compiler made of it counted: graphs and breaks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LIMIT = 1024  # of code that is compiled again: at 8, PyTorch's default, it goes on without


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, and let layers of many shapes be compiled each."""
    import torch._dynamo.config

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
        yield


class Compiled(nn.Module):
    """Called as the model is.  Shapes are constants to the compiler; a break is no error here."""

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        super().__init__()
        self.model, self.backend = model, backend
        self.graphs = self.prepared = self.breaks = 0
        self._run = torch.compile(model, backend=self._counting, dynamic=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def prepare(self, step: Callable[[], object]) -> None:
        """Compile by two steps: backward may be compiled when the second one needs it."""
        from torch._dynamo.utils import counters

        before = sum(counters["graph_break"].values())
        step(), step()
        self.breaks = sum(counters["graph_break"].values()) - before
        self.prepared = self.graphs

    def path(self) -> str:
        """ "inductor: 1 graph, 0 breaks", and what was compiled since ``prepare``."""
        if not self.graphs:
            return f"not compiled: {self.backend} was given no graph"
        counted = [
            f"{number} {word}{'' if number == 1 else 's'}"
            for number, word in ((self.prepared, "graph"), (self.breaks, "break"))
        ]
        again = self.graphs - self.prepared
        return f"{self.backend}: {', '.join(counted)}" + (f", {again} compiled later" * bool(again))

    def _counting(self, graph: Any, inputs: Any, **options: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        return lookup_backend(self.backend)(graph, inputs, **options)
