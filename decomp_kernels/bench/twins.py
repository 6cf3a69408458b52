"""The same model several times over: copies on the same base weights, and the peer on a copy.

A twin costs no memory but its adapters', so that a comparison of whole models has each of them at
hand in every round.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from torch import nn

from decomp_kernels.bench import formulas, peers
from decomp_kernels.linear import Decomposed
from decomp_kernels.methods.base import Method

PEFT = "PEFT"
FORMULA = "authors' formula"


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters.  Frozen ones are never written to, merging included."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def sibling(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters alone; what is trained has the same values."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def method_of(model: nn.Module) -> Method:
    """The method that an adapted model was adapted with."""
    layer: Any = next(m for m in model.modules() if isinstance(m, Decomposed))
    return layer.adapters[layer.active_adapter].method


def peer_of(
    model: nn.Module, method: Method, adapted: list[str], *, wide: bool = True
) -> tuple[nn.Module, str] | None:
    """(the same method by others on the same modules, whose it is), None where nobody has it.

    adapted: paths of the modules.  wide: PEFT's matrices in float32 on a 16-bit model, which is its
    default and ours.  Raises ValueError where PEFT does not take these options or shapes.
    """
    if formulas.why_not(method) is None:
        return with_formulas(model, adapted, lambda _, at: formulas.at_start(at, method)), FORMULA
    if method.name not in peers.CONFIGS or find_spec("peft") is None:
        return None
    import peft

    # PiSSA writes its residual into the base weights, which are everyone's.
    copied: Any = copy.deepcopy(model) if method.name == "pissa" else twin(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peers.CONFIGS[method.name](method)
        config.target_modules = set(adapted)
        if getattr(config, "feedforward_modules", None):
            config.feedforward_modules = set(adapted)
        return peft.get_peft_model(copied, config, autocast_adapter_dtype=wide), PEFT


def with_formulas(
    model: nn.Module, adapted: Iterable[str], make: Callable[[str, nn.Linear], nn.Module]
) -> nn.Module:
    """A twin with ``make(path, linear)`` in place of the modules at these paths."""
    made = twin(model)
    for path in adapted:
        parent, _, last = path.rpartition(".")
        setattr(made.get_submodule(parent), last, make(path, _as_linear(made.get_submodule(path))))
    return made


def _as_linear(module: Any) -> nn.Linear:
    """GPT-2's Conv1D as the nn.Linear that computes the same; an nn.Linear as it is."""
    if isinstance(module, nn.Linear):
        return module
    K, N = module.weight.shape
    linear = nn.Linear(K, N, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(module.weight.T, requires_grad=False)
    linear.bias = module.bias
    return linear
