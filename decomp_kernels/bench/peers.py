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


def _low_rank(method: Any, **extra: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout,
        use_rslora=method.use_rslora, **_TARGET, **extra,
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


def _same_options(config: str, **names: str) -> Callable[[Any], Any]:
    """A configuration whose options are ours: PEFT's name = our name; None is PEFT's default."""

    def make(method: Any) -> Any:
        import peft

        options = {theirs: getattr(method, ours) for theirs, ours in names.items()}
        given = {name: value for name, value in options.items() if value is not None}
        return getattr(peft, config)(**given, **_TARGET)

    return make


CONFIGS: dict[str, Callable[[Any], Any]] = {
    "lora": _low_rank,
    "dora": lambda method: _low_rank(method, use_dora=True),
    "pissa": lambda method: _low_rank(method, init_lora_weights="pissa_niter_4"),
    "adalora": _adalora,
    "vera": _same_options("VeraConfig", r="r", vera_dropout="dropout", d_initial="d_initial"),
    "hira": _same_options("HiraConfig", r="r"),
    "liera": _same_options("HiraConfig", r="r"),
    "loha": _same_options("LoHaConfig", r="r", alpha="alpha"),
    "lokr": _same_options("LoKrConfig", r="r", alpha="alpha", decompose_both="decompose_both"),
    "oft": _oft,
    "boft": _same_options("BOFTConfig", boft_block_size="block_size", boft_block_num="block_num"),
    "hra": _same_options("HRAConfig", r="r", apply_GS="apply_GS"),
    "sparse": _same_options("ShiraConfig", r="r"),
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
