"""Everything that a failed call must leave as it was, taken before it and compared after it."""

import torch
from torch import nn


class Snapshot:
    """The state dict bit for bit, Parameter and module objects, classes, flags, attributes."""

    def __init__(self, model: nn.Module, x=None) -> None:
        self.model, self.x = model, x
        self.tensors = {name: t.clone() for name, t in model.state_dict().items()}
        self.facts = self._facts()
        self.output = None if x is None else self._forward()

    def _forward(self):
        with torch.no_grad():
            return self.model(self.x)

    def _facts(self):
        modules = {
            name: (id(module), type(module), module.training, sorted(vars(module)))
            for name, module in self.model.named_modules()
        }
        parameters = {
            name: (id(p), p.requires_grad, p.dtype, p.device)
            for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        states = {
            name: (m.active_adapter, m.disabled, getattr(m, "merged_adapter", None))
            for name, m in self.model.named_modules()
            if hasattr(type(m), "set_adapter")
        }
        return modules, parameters, states

    def assert_unchanged(self) -> None:
        now = self.model.state_dict()
        assert list(now) == list(self.tensors)
        for name, tensor in self.tensors.items():
            assert same_bits(now[name], tensor), f"{name} has changed"
        assert self._facts() == self.facts
        if self.x is not None:
            assert same_bits(self._forward(), self.output), "the output has changed"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits: a NaN equals itself, and -0 is not 0."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.device.type == "meta":
        return True
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)
