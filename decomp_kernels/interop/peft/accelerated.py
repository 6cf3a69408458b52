"""A PEFT layer on our operator: the same function of the same Parameters, or PEFT's own forward.

``Accelerated`` is mixed in before PEFT's class, and the joined class is put on an existing layer.
Each forward asks ``_plan`` whether the operator computes what PEFT would; where it does not, PEFT's
forward runs and the reason is counted.  Nothing of the layer changes but its class and ``fused``.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from peft.tuners.boft.layer import MultiplicativeDropoutLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from decomp_kernels.methods.base import Base, Method
from decomp_kernels.ops.autocast import autocast_dtype
from decomp_kernels.peft_form import ADAPTER, PeftTensor
from decomp_kernels.quantized import is_torchao, quantized_weight, why_not_quantized
from decomp_kernels.quantized_weight import QuantizedWeight

FUSED = "fused"

# Modules that the operator stands in for.  Exact classes: FSDP2 and others make classes of theirs.
PARTS = (
    nn.Linear,
    nn.Dropout,
    nn.Identity,
    DoraLinearLayer,
    MultiplicativeDropoutLayer,
    OFTRotationModule,
)


class PeftForward(Exception):
    """No error: why a forward is PEFT's own.  Raised where it is planned, caught where it runs."""


class View:
    """What a method has as its adapter: PEFT's tensors under our names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


class Plan(NamedTuple):
    """One forward on the operator."""

    method: Method
    view: Any
    base: Base
    adapter: str


class Fused:
    """What accelerate leaves on a layer."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()  # eager forwards, by FUSED or why they were PEFT's
        self.norms: dict[str, tuple[Any, ...]] = {}  # what DoRA keeps, by adapter


class Accelerated:
    """Mixed in before a PEFT layer's class; the methods' classes say how PEFT's options are ours.

    container: the attribute with an entry for each adapter of the layer.  dropout: the one with the
    dropout modules.  keeps_dtype: PEFT's result has x's dtype, whatever autocast made of it.
    quantized: PEFT reads a quantised base as what it stands for.  widens: and its result is then
    float32.
    """

    container: str
    dropout: str | None = None
    keeps_dtype = False
    quantized = True
    widens = False
    fused: Fused
    training: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            plan, path = self._plan(x, args, kwargs), FUSED
        except PeftForward as reason:
            plan, path = None, str(reason)
        if not torch.compiler.is_compiling():
            self.fused.calls[path] += 1
        if plan is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = self._run(plan, x)
        quantized = isinstance(plan.base.weight, QuantizedWeight)
        return y.to(self.result_dtype(x, y, quantized))

    def method_of(self, adapter: str) -> Method:
        """Our method with the live options of this adapter; raises PeftForward."""
        raise NotImplementedError

    def _plan(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        layer: Any = self
        if in_transform():
            raise PeftForward("inside a transform of torch.func or forward-mode AD")
        further = [name for name, value in kwargs.items() if value is not None]
        if args or further:
            raise PeftForward(f"called with {', '.join(further) or 'further arguments'}")
        if layer.disable_adapters:
            raise PeftForward("disabled")
        if layer.merged:
            raise PeftForward("merged")
        if not getattr(self, "cast_input_dtype_enabled", True):
            raise PeftForward("the casting of its input is disabled")
        present = getattr(self, self.container)
        active = [name for name in layer.active_adapters if name in present]
        if len(active) != 1:
            raise PeftForward("several active adapters" if active else "no active adapter")
        method = self.method_of(active[0])
        base = base_of(layer.base_layer, x)
        if isinstance(base.weight, QuantizedWeight) and not self.quantized:
            raise PeftForward("its base is quantised")
        assert method.peft_form is not None
        named = method.peft_form.tensors
        found = {name: find(self, tensor, active[0]) for name, tensor in named.items()}
        theirs = {name: tensor for name, tensor in found.items() if tensor is not None}
        check_tensors(x, base, list(theirs.values()))
        view = View({name: named[name].ours(tensor) for name, tensor in theirs.items()})
        plan = Plan(method, view, base, active[0])
        self.check_precision(plan, x)
        return plan

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        return plan.method.forward(plan.view, plan.base, x, training=True)

    def result_dtype(self, x: Tensor, y: Tensor, quantized: bool) -> torch.dtype:
        """Of PEFT's result, where ``y`` has that of a plain linear."""
        if quantized and self.widens:
            return torch.promote_types(x.dtype, torch.float32)
        return x.dtype if self.keeps_dtype or quantized else y.dtype

    def check_precision(self, plan: Plan, x: Tensor) -> None:
        """Raise PeftForward where PEFT would be the more exact one."""

    def live_dropout(self, adapter: str) -> float:
        """p of this forward's dropout: 0 in evaluation."""
        if self.dropout is None:
            return 0.0
        module = getattr(self, self.dropout)[adapter]
        check_part(module, self.dropout)
        p = 0.0 if type(module) is nn.Identity or not module.training else module.p
        if p > 0.999:  # of a mask that keeps nothing
            raise PeftForward(f"a dropout of {p}")
        return p


def live(method: type[Method], **options: Any) -> Any:
    """``method(**options)`` without its checks, which a compiler cannot read: PEFT made its own."""
    made = object.__new__(method)
    for name, value in options.items():
        object.__setattr__(made, name, value)
    return made


def in_transform() -> bool:
    """Whether torch.func (grad, vmap, ...) is at work, for which our functions have no rules.

    What a compiler traces it differentiates by itself.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return functorch or torch.autograd.forward_ad._current_level >= 0


def scale_of(scale: Any) -> float:
    """A layer's scaling, which hot-swapping may have made a tensor."""
    if isinstance(scale, Tensor):
        raise PeftForward("its scale is a tensor")
    return float(scale)


def find(layer: Any, tensor: PeftTensor, adapter: str) -> Tensor | None:
    """The tensor of one adapter in PEFT's layer, None where the layer has none."""
    value = layer
    for part in tensor.path.split("."):
        if part == ADAPTER:
            if adapter not in value:
                return None
            value = value[adapter]
            if isinstance(value, nn.Module):
                check_part(value, tensor.path.partition(".")[0])
        else:
            value = getattr(value, part)
    return value


def base_of(module: nn.Module, x: Tensor) -> Base:
    """A linear that holds a plain weight, or a quantised one that we read."""
    kind = type(module)
    if kind not in (nn.Linear, Conv1D) and not kind.__module__.startswith("bitsandbytes."):
        raise PeftForward(f"its base layer is {class_name(module)}")
    weight: Any = module.weight
    bias: Any = module.bias
    if kind in (nn.Linear, Conv1D) and type(weight) is nn.Parameter:
        if weight.requires_grad:
            raise PeftForward("its base weight trains")
        weight = weight.T if kind is Conv1D else weight
    elif kind is Conv1D:
        raise PeftForward(f"its weight is a {type(weight).__name__}")
    else:
        weight = quantized_base(module, x)
    check_hooks(module, "its base layer")
    return Base(weight, bias, weight.dtype)


def quantized_base(module: Any, x: Tensor) -> QuantizedWeight:
    """The quantised weight, where the library would multiply in x's dtype as we do."""
    weight = quantized_weight(module)
    if weight is None:
        reason = why_not_quantized(module)
        raise PeftForward(reason or f"its weight is a {type(module.weight).__name__}")
    if hasattr(module, "compute_dtype"):  # Linear4bit
        chosen = module.compute_type_is_set or x.dtype == torch.float16
        if chosen and module.compute_dtype not in (None, x.dtype):
            raise PeftForward(f"its base computes in {module.compute_dtype}, x is {x.dtype}")
    elif is_torchao(module.weight) and autocast_dtype(x) is not None:
        raise PeftForward("autocast with a torchao weight")
    return weight


def check_part(module: nn.Module, name: str) -> None:
    if type(module) not in PARTS:
        raise PeftForward(f"its {name} is {class_name(module)}")
    check_hooks(module, f"its {name}")


def check_hooks(module: nn.Module, name: str) -> None:
    """Hooks of a module whose place the operator takes would not be called."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        raise PeftForward(f"{name} has hooks")


def check_tensors(x: Tensor, base: Base, others: list[Tensor]) -> None:
    """others: the adapter's."""
    weight = base.weight
    held = weight.tensors() if isinstance(weight, QuantizedWeight) else (weight,)
    biases = () if base.bias is None else (base.bias,)
    for tensor in (x, *held, *biases, *others):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise PeftForward(f"it holds or is given a {type(tensor).__name__}")
        if tensor.device != x.device:
            raise PeftForward("its tensors are on several devices")
    dtypes = {tensor.dtype for tensor in others if tensor.is_floating_point()}
    quantized = isinstance(weight, QuantizedWeight)
    if autocast_dtype(x) is None:
        fits = (quantized or x.dtype == weight.dtype) and len(dtypes) == 1
        fits = fits and dtypes.issubset((x.dtype, torch.promote_types(x.dtype, torch.float32)))
    else:  # x is cast, and what is of another dtype than the weight must be wide enough for it
        wide = torch.promote_types(weight.dtype, torch.float32)
        fits = quantized or dtypes.issubset((weight.dtype, wide))
    if not fits:
        listed = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise PeftForward(f"x is {x.dtype}, its weight {weight.dtype}, its adapter {listed}")


def class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
