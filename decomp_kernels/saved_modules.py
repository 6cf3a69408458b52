"""modules_to_save: modules trained whole beside the adapters; the originals stay, copies train."""

import copy
from typing import Any

from torch import nn


class TrainedCopy(nn.Module):
    """The original module, frozen, and one trained copy of it for each adapter name.

    Attributes that it does not have itself are those of the module in use, so that code which
    reads ``head.weight`` goes on working.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.disabled = 0  # how many ``disable`` contexts the module is in

    def add(self, name: str, made: nn.Module) -> None:
        """Take the copy ``made`` for ``name``, in use and trained."""
        self.copies[name] = made
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        self.active_adapter = name
        self.original.requires_grad_(False)
        for other, module in self.copies.items():
            module.requires_grad_(other == name)

    def current(self) -> nn.Module:
        if self.disabled or self.active_adapter is None:
            return self.original
        return self.copies[self.active_adapter]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "disabled": 0}  # a copy made inside ``disable`` is not in it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original", "copies"):  # while unpickling there is nothing to ask yet
                raise
            return getattr(self.current(), name)


def trained_copies(model: nn.Module) -> dict[str, TrainedCopy]:
    """The modules of ``model`` that are trained whole, by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TrainedCopy)}


def copy_of(module: nn.Module) -> nn.Module:
    """A copy to train of a module, or of the original under a TrainedCopy."""
    return copy.deepcopy(module.original if isinstance(module, TrainedCopy) else module)


def replace_module(model: nn.Module, old: nn.Module, new: Any) -> Any:
    """Put ``new`` wherever ``model`` has the module ``old``, under every name of it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new
