"""PEFT's layers that compute the same function as our methods.

A peer is made from a fresh frozen linear and our method's instance, so that both have the same
options.  PEFT is imported by the call that needs it.  Methods that PEFT lacks: formulas.py.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from decomp_kernels.methods.base import Method
from decomp_kernels.methods.hira import HiRA
from decomp_kernels.peft_form import PeftForm

_TARGET = {"target_modules": ["0"]}


def why_not(method: Method) -> str | None:
    """Why PEFT's layer is no contender for our method's instance; None where it is one."""
    if method.name not in CONFIGS:
        return f"PEFT has no {method.name}"
    return None if find_spec("peft") else "peft is not installed"


def peft_layer(method: Method, linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer with our instance's options.  Raises ValueError where PEFT refuses them.

    dtype: of the adapter's matrices; PEFT has the base's own, or float32 by its default.
    """
    return _peft_layer(CONFIGS[method.name](method), linear, dtype)


def described(layer: nn.Module) -> str:
    """Whose a PEFT layer is, and the dtype of what it trains."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in layer.parameters() if p.requires_grad}
    package = ".".join(type(layer).__module__.split(".")[:3])
    return f"{package}, {' and '.join(sorted(dtypes))} adapters"


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
