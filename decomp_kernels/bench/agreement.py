"""|theirs - ours| / |ours| of losses and gradients: whether two adapted models compute the same.

Both get the same adapters first.  A peer's tensors are laid out as its library has them, ours are
brought into that form.
"""

from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.bench import formulas, peers
from decomp_kernels.bench.contenders import leave_the_start
from decomp_kernels.bench.trainee import Trainee, causal
from decomp_kernels.linear import Decomposed, adapted_layers
from decomp_kernels.methods.base import Method
from decomp_kernels.peft_form import ADAPTER, PeftTensor

# How far a contender's loss may be from ours, relative, and its gradients of one kind as one vector
# in a model of one adapted layer; of more, times the root of their number, as errors of rounding
# add up.  They differ by the order of sums, and in 16 bits by where each of them rounds.
TOLERANCE = {"float32": (1e-5, 2e-4), "bfloat16": (1e-2, 0.01), "float16": (1e-2, 0.01)}


@torch.no_grad()
def move(model: nn.Module, dtype: torch.dtype) -> None:
    """Take what is trained away from its start, to values that ``dtype`` has exactly.

    A peer may hold in that dtype what we hold in float32, and then starts from the same values.
    """
    leave_the_start(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def kinds_of(method: Method, adapter: nn.Module) -> dict[str, tuple[PeftTensor, list[str]]]:
    """{path in the peer's layer: (its layout, the names of ours that are its parts)}.

    A formula has our names.  Empty where PEFT has the method and its tensors are not ours.
    """
    named = {name: PeftTensor(name) for name, _ in adapter.named_parameters()}
    if formulas.why_not(method) is not None and method.name in peers.CONFIGS:
        named = {} if method.peft_form is None else method.peft_form.tensors
    kinds: dict[str, tuple[PeftTensor, list[str]]] = {}
    for name, tensor in named.items():
        kinds.setdefault(tensor.path, (tensor, []))[1].append(name)
    return kinds


def _ours(layer: Any, names: list[str]) -> list[Tensor]:
    """Our tensors of these names; empty where the layer has none."""
    adapter = layer.adapters["default"]
    found = [getattr(adapter, name, None) for name in names]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _theirs(layer: nn.Module, path: str) -> Tensor | None:
    at: Any = layer
    for part in path.replace(ADAPTER, "default").split("."):
        at = getattr(at, part, None)
    return at if isinstance(at, Tensor) else None


@torch.no_grad()
def copy_adapters(ours: nn.Module, method: Method, peer: nn.Module) -> None:
    """Give PEFT's model the values of our adapters."""
    for path, layer in adapted_layers(ours).items():
        for kind, (form, names) in kinds_of(method, layer.adapters["default"]).items():
            theirs = _theirs(causal(peer).get_submodule(path), kind)
            parts = _ours(layer, names)
            if theirs is not None and parts:
                theirs.copy_(form.theirs(torch.cat(parts)))


class Disagreement(RuntimeError):
    """Two models that are to be compared do not compute the same."""


def agree(trainees: list[Trainee], method: Method, dtype: str) -> dict[str, dict[str, Any]]:
    """{contender: {"loss", "gradient_error"}}, each model's in its first state.

    gradient_error is |theirs - ours| / |ours|, the largest over x and the kinds of tensors, each as
    one vector over all layers.  With dropout the models are compared in evaluation, for each draws
    its own masks; the compiled ones, which would be compiled anew for that, are then not.  Raises
    Disagreement where one is further from ours than TOLERANCE[dtype] allows.
    """
    has_dropout = bool(getattr(method, "dropout", 0.0))
    ours = next(trainee for trainee in trainees if isinstance(trainee.first_layer, Decomposed))
    first: Any = ours.first_layer
    kinds = kinds_of(method, first.adapters["default"])
    of_loss, of_gradients = TOLERANCE[dtype]
    limits = of_loss, of_gradients * len(ours.layers) ** 0.5
    found: dict[str, dict[str, Any]] = {}
    expected: dict[str, Tensor] = {}
    for trainee in [ours, *(trainee for trainee in trainees if trainee is not ours)]:
        if has_dropout and trainee.compiled is not None:
            found[trainee.name] = {"loss": None, "gradient_error": None}
            continue
        trainee.reset()
        trainee.model.train(not has_dropout)
        loss = trainee.loss()
        loss.backward()
        trainee.model.train()
        error = None
        if trainee is ours:
            expected = _gradients(trainee, kinds)
        elif trainee.trained:
            got = _gradients(trainee, kinds)
            error = max(_distance(got.get(kind), gradient) for kind, gradient in expected.items())
            _check(trainee.name, loss.item(), found[ours.name]["loss"], error, limits)
        found[trainee.name] = {"loss": loss.item(), "gradient_error": error}
        trainee.reset()
    return found


def _check(name: str, loss: float, ours: float, error: float, limits: tuple[float, float]) -> None:
    of_loss, of_gradients = limits
    if not (abs(loss - ours) <= of_loss * abs(ours) and error <= of_gradients):
        raise Disagreement(
            f"{name} must compute what ours does to be compared with it: its loss is {loss:.6g} "
            f"and ours {ours:.6g}, which may differ by {of_loss:g} of it; its gradients "
            f"differ by {error:.2g} of ours, which may be {of_gradients:.2g}"
        )


def _gradients(
    trainee: Trainee, kinds: dict[str, tuple[PeftTensor, list[str]]]
) -> dict[str, Tensor]:
    """{"x" or a kind of tensor: its gradients in all layers, as one vector}, laid out as theirs."""
    found: dict[str, list[Tensor | None]] = {"x": [trainee.x.grad]}
    for layer in trainee.layers.values():
        for kind, (form, names) in kinds.items():
            if isinstance(layer, Decomposed):
                parts = [part.grad for part in _ours(layer, names) if part.grad is not None]
                gradient = form.theirs(torch.cat(parts)) if parts else None
            else:
                theirs = _theirs(layer, kind)
                gradient = None if theirs is None else theirs.grad
            found.setdefault(kind, []).append(gradient)
    vectors = {
        kind: [gradient.double().flatten() for gradient in gradients if gradient is not None]
        for kind, gradients in found.items()
    }
    return {kind: torch.cat(vector) for kind, vector in vectors.items() if vector}


def _distance(theirs: Tensor | None, ours: Tensor) -> float:
    if theirs is None or theirs.shape != ours.shape:
        return float("inf")
    return (torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(ours)).item()
