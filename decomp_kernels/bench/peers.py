"""The layers of others that compute the same function: PEFT's, or the authors' formula.

A peer is made from a fresh frozen linear and our method's instance, so that both have the same
options.  PEFT is imported by the call that needs it.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.methods.base import Method
from decomp_kernels.methods.hira import HiRA
from decomp_kernels.peft_form import PeftForm

Peer = Callable[[nn.Linear, Any, torch.dtype], nn.Module]

_TARGET = {"target_modules": ["0"]}


def peer(method: Method, linear: nn.Linear, dtype: torch.dtype) -> tuple[nn.Module, str] | None:
    """(layer, what it is) for our method's instance; None where nobody has the method.

    dtype: of the adapter's matrices; PEFT has the base's own, or float32 by its default.
    """
    if method.name in FORMULAS:
        module = FORMULAS[method.name](linear, method)
        return module, "authors' formula"
    if method.name not in CONFIGS or find_spec("peft") is None:
        return None
    module = _peft_layer(CONFIGS[method.name](method), linear, dtype)
    return module, ".".join(type(module).__module__.split(".")[:3])


def _peft_layer(config: Any, linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer in a model of one linear, without the model's own wrapper."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model without a configuration
        model = get_peft_model(
            nn.Sequential(linear),
            config,
            autocast_adapter_dtype=dtype != linear.weight.dtype,
        )
    return model.base_model.model[0]


def _pissa(method: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout,
        use_rslora=method.use_rslora, init_lora_weights="pissa_niter_4", **_TARGET,
    )  # fmt: skip


def _adalora(method: Any) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=method.r, target_r=max(1, method.r // 2), lora_alpha=method.alpha,
        lora_dropout=method.dropout, tinit=0, tfinal=1, total_step=100, **_TARGET,
    )  # fmt: skip


def _ia3(feedforward: list[str]) -> Any:
    from peft import IA3Config

    return IA3Config(feedforward_modules=feedforward, **_TARGET)


def _oft(method: Any) -> Any:
    from peft import OFTConfig

    return OFTConfig(
        r=method.r or 0, oft_block_size=method.block_size or 0,
        use_cayley_neumann=method.use_cayley_neumann, **_TARGET,
    )  # fmt: skip


def _same_options(method: Any, form: PeftForm | None = None) -> Any:
    """The configuration of ``form``, the method's own by default, with the method's options; None
    among them is PEFT's default.
    """
    import peft

    form = form or type(method).peft_form
    assert form is not None
    options = {theirs: getattr(method, ours) for ours, theirs in form.options.items()}
    given = {name: value for name, value in options.items() if value is not None}
    return getattr(peft, form.config)(**form.fixed, **given, **_TARGET)


CONFIGS: dict[str, Callable[[Any], Any]] = {
    "lora": _same_options,
    "dora": _same_options,
    "pissa": _pissa,
    "adalora": _adalora,
    "vera": _same_options,
    "hira": _same_options,
    "liera": lambda method: _same_options(method, HiRA.peft_form),
    "loha": _same_options,
    "lokr": _same_options,
    "oft": _oft,
    "boft": _same_options,
    "hra": _same_options,
    "sparse": _same_options,
    "ia3": lambda method: _ia3([]),
    "ssl": lambda method: _ia3(["0"]),
}


class SSBFormula(nn.Module):
    """y = x (row * W * col)^T + b: the paper's reference form, the scaled weight made each time."""

    def __init__(self, linear: nn.Linear, method: Method) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        weight = linear.weight
        self.row = nn.Parameter(weight.new_ones(weight.shape[0], 1))
        self.col = nn.Parameter(weight.new_ones(1, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.row * self.linear.weight * self.col, self.linear.bias)


FORMULAS: dict[str, Callable[[nn.Linear, Method], nn.Module]] = {"ssb": SSBFormula}
