"""The LoRA functions of axolotl and unsloth, on one linear, where a GPU and the packages are there.

    axolotl.kernels.lora.LoRA_O.apply(X, X_drop, W, b, W_quant, A, B, s, lora_bias, magnitude)
    unsloth.kernels.fast_lora.LoRA_W.apply(X, W, W_quant, A, B, s[, dropout, bias])

Both take x of three dimensions in their backward.  They get copies of our adapter's tensors, so
that what they compute can be compared with ours; one that computes something else is no contender.
Sources: the two files at https://github.com/axolotl-ai-cloud/axolotl (src/axolotl/kernels/lora.py)
and https://github.com/unslothai/unsloth (unsloth/kernels/fast_lora.py).
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.methods.base import Method
from decomp_kernels.testing import relative_error

AXOLOTL, UNSLOTH = "axolotl", "unsloth"
NAMES = (AXOLOTL, UNSLOTH)
SAME = 0.05  # relative: 16-bit roundings of another order are below, another function is above


def why_not(name: str, method: Method, bias: bool) -> str | None:
    """Why the package's function is no contender for our method's instance; None where it is."""
    given: Any = method
    if method.name not in ("lora", "dora") or given.activation != "identity":
        return f"{name} has no {method.name}"
    if find_spec(name) is None:
        return f"{name} is not installed"
    try:
        function = _function(name)
    except Exception as error:  # these packages check GPUs, drivers and versions on import
        return f"{name} cannot be imported: {type(error).__name__}: {str(error)[:200]}"
    if name == AXOLOTL:
        if method.name == "dora" and given.dropout and given.dropout_mode != "branch":
            return "axolotl's DoRA drops x of the branch alone, another function"
        return None
    if method.name == "dora":
        return "unsloth has no dora: PEFT's own forward runs"
    takes = len(inspect.signature(function.forward).parameters) - 1  # without ctx
    if takes < 8 and (given.dropout or bias):
        return f"this version's LoRA_W takes no {'dropout' if given.dropout else 'bias'}"
    return None


def layer(name: str, linear: nn.Linear, adapter: Any, dtype: torch.dtype) -> nn.Module:
    """The package's function on a frozen linear with copies of our adapter's tensors in dtype."""
    return _Layer(_apply(name), linear, adapter, dtype)


@torch.no_grad()
def difference(made: nn.Module, ours: nn.Module, x: Tensor) -> float:
    """||theirs - ours|| / ||ours||, both without dropout."""
    assert isinstance(made, _Layer)
    dropout, training = made.dropout, ours.training
    made.dropout = 0.0
    try:
        return relative_error(made(x), ours.eval()(x))
    finally:
        made.dropout = dropout
        ours.train(training)


def described(name: str, layer: nn.Module) -> str:
    """Whose function of which version it is, and the dtype of what it trains."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "of no version"
    dtypes = {str(p.dtype).removeprefix("torch.") for p in layer.parameters() if p.requires_grad}
    kept = ", norm kept while A and B do not change" if hasattr(layer, "magnitude") else ""
    return f"{name} {version}, {' and '.join(sorted(dtypes))} adapters{kept}"


class _Layer(nn.Module):
    """y = apply(x [1, M, K], ...) [M, N]"""

    def __init__(
        self, apply: Callable[..., Tensor], linear: nn.Linear, adapter: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.apply_function, self.linear = apply, linear.requires_grad_(False)
        self.scale, self.dropout = adapter.method.scale, adapter.method.dropout
        for name in ("down", "up", "magnitude"):
            ours = getattr(adapter, name, None)
            if ours is not None:
                self.register_parameter(name, nn.Parameter(ours.detach().clone().to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_function(self, x[None]).squeeze(0)


def _apply(name: str) -> Callable[[_Layer, Tensor], Tensor]:
    function = _function(name)

    def axolotl(of: _Layer, x: Tensor) -> Tensor:
        dropped = F.dropout(x, of.dropout) if of.dropout else None
        made: Tensor = function.apply(
            x, dropped, of.linear.weight, of.linear.bias, None, of.down, of.up, of.scale, None,
            getattr(of, "magnitude", None),
        )  # fmt: skip
        return made

    def unsloth(of: _Layer, x: Tensor) -> Tensor:
        more = (of.dropout, of.linear.bias) if of.dropout or of.linear.bias is not None else ()
        made: Tensor = function.apply(x, of.linear.weight, None, of.down, of.up, of.scale, *more)
        return made

    return axolotl if name == AXOLOTL else unsloth


def _function(name: str) -> Any:
    if name == AXOLOTL:
        return import_module("axolotl.kernels.lora").LoRA_O
    # Importing unsloth itself changes transformers and PEFT, that is other contenders: only its
    # kernels are imported, under a parent package that has run nothing.
    if UNSLOTH not in sys.modules:
        spec = find_spec(UNSLOTH)
        assert spec is not None
        parent = ModuleType(UNSLOTH)
        parent.__spec__, parent.__path__ = spec, list(spec.submodule_search_locations or ())
        sys.modules[UNSLOTH] = parent
    return import_module("unsloth.kernels.fast_lora").LoRA_W
