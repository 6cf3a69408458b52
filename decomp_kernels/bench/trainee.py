"""A model in training as a contender: loss, its gradients, AdamW on what is trained.

What it ran is seen in steps that are not timed, and counted where the run itself counts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.bench import memory
from decomp_kernels.bench.compiled import Compiled
from decomp_kernels.bench.contenders import ACCELERATED
from decomp_kernels.bench.engine import Contender
from decomp_kernels.bench.observed import Observed
from decomp_kernels.interop.peft.accelerate import fused_calls

LEARNING_RATE = 1e-4


class Trainee:
    """One model in training: its own adapters, its own optimizer and its own input.

    layers: paths of the adapted layers.
    """

    def __init__(self, name: str, model: nn.Module, tokens: Tensor, layers: Sequence[str]) -> None:
        self.name, self.model, self.tokens = name, model, tokens
        self.layers = {path: causal(model).get_submodule(path) for path in layers}
        self.first_layer = next(iter(self.layers.values()))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # The embeddings are looked up once: nothing trains there, no gradient goes further.
        embeddings: Any = causal(model).get_input_embeddings()
        self.x = embeddings(tokens).detach().requires_grad_()
        self.optimizer = torch.optim.AdamW(self.trained, LEARNING_RATE) if self.trained else None
        self.run: Any = model
        self.compiled: Compiled | None = None
        self.seen = ""

    def compile(self, backend: str) -> None:
        self.run = self.compiled = Compiled(self.model, backend)

    def loss(self) -> Tensor:
        return self.run(inputs_embeds=self.x, labels=self.tokens).loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def reset(self) -> None:
        self.x.grad = None
        for parameter in self.trained:
            parameter.grad = None

    def contender(self) -> Contender:
        return Contender(self.name, self.loss, self.backward, self.reset, self.path())

    def observe(self) -> None:
        """See which way a step takes: by steps that are not timed and move no parameter."""

        def step() -> None:
            self.reset()
            self.loss().backward()

        if self.compiled is not None:
            self.compiled.prepare(step)
        else:
            step()
            with Observed() as observed, _Called(self.layers.values()) as called:
                step()
            self.seen = observed.path() or called.path()
        self.reset()

    def path(self) -> str:
        """What was seen to run; of a compiled model and of an accelerated one, until now."""
        if self.compiled is not None:
            return self.compiled.path()
        if self.name == ACCELERATED:
            fused, calls = fused_calls(self.model)
            return f"{self.seen}, {fused} of {calls} calls fused"
        return self.seen

    def memory(self, device: torch.device) -> dict[str, int]:
        contender = self.contender()
        kept = [*self.model.parameters(), *self.model.buffers()]
        return {
            "peak_bytes": memory.peak_bytes(contender, device),
            "saved_bytes": memory.saved_bytes(contender, kept),
        }


class _Called:
    """Counts the forwards of some modules, by class, while it is open."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.classes: Counter[str] = Counter()

    def __enter__(self) -> "_Called":
        self.hooks = [module.register_forward_hook(self._count) for module in self.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _count(self, module: nn.Module, *_: object) -> None:
        self.classes[f"{type(module).__module__}.{type(module).__qualname__}"] += 1

    def path(self) -> str:
        return ", ".join(f"{number} x {name}" for name, number in self.classes.items())


def causal(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
