"""A module trained whole beside the adapters: the original stays, copies train (modules_to_save)."""

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
        self.disabled = False

    def add(self, name: str) -> None:
        """A new copy for ``name``, in use and trained."""
        self.copies[name] = copy.deepcopy(self.original)
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original", "copies"):  # while unpickling there is nothing to ask yet
                raise
            return getattr(self.current(), name)


def replace_module(model: nn.Module, name: str, new: Any) -> Any:
    """Put ``new`` where ``model`` has the module ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return new
