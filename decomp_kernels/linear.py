"""DecomposedLinear: an nn.Linear with named adapters, one of them active.

    state dict    weight, bias                the base layer's own Parameter objects
                  adapters.<name>.<tensor>    down, up, core, in_scale, out_scale, magnitude, ...

The class is put on an existing module by changing ``module.__class__``: its name in the model, its
hooks, its training mode and every reference to it stay as they are, and removing is exact.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels import dispatch
from decomp_kernels.methods.base import Adapter, Base, Holder, Method
from decomp_kernels.quantized import is_quantized, is_torchao
from decomp_kernels.quantized_weight import QuantizedWeight


class Decomposed(Holder):
    """What an adapted module adds to its own class; mixed in before nn.Linear or GPT-2's Conv1D."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    training: bool
    adapters: nn.ModuleDict
    active_adapter: str | None
    disabled: int  # how many ``disable`` contexts the layer is in
    merged_adapter: str | None
    requantization_error: float | None = None  # of a merged weight: ||quantised - W'|| / ||W'||
    kept_base: tuple[Any, Tensor | None] | None  # held_weight and bias from before merging

    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapter
        if name is None or self.disabled or self.merged_adapter is not None:
            return super().forward(x)  # type: ignore[misc]
        adapter: Any = self.adapters[name]
        if not adapter.initialized:
            raise RuntimeError(
                f"adapter {name!r} was made on the meta device and has no values yet; load the "
                "base weights, then call decomp_kernels.initialize(model)"
            )
        return adapter(self.base(), x, self.training)

    def current(self) -> Adapter | None:
        return None if self.active_adapter is None else self.adapters[self.active_adapter]  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        return self.merged_adapter is not None

    def base(self, path: str = "", dtype: torch.dtype | None = None) -> Base:
        weight = self.base_weight()
        return Base(weight, self.bias, weight.dtype if dtype is None else dtype, path)

    def base_weight(self) -> Tensor | QuantizedWeight:
        """The weight as [out, in]."""
        return self.weight

    def stored(self, weight: Tensor) -> Tensor:
        """An [out, in] weight in the layout of this module's own parameter."""
        return weight

    def make_adapter(
        self,
        method: Method,
        path: str = "",
        dtype: torch.dtype | None = None,
        shared: dict[str, nn.Parameter] | None = None,
    ) -> Adapter:
        """A new adapter for this layer, not yet attached.  Raises where the method does not fit.

        dtype: of its matrices; None is float32 on a bf16 or fp16 base, as PEFT has it.
        """
        weight = self.base_weight()
        method.check_shape(weight.shape[0], weight.shape[1], path)
        if isinstance(weight, QuantizedWeight) and method.impl not in dispatch.TAKE_QUANTIZED:
            raise ValueError(
                f"impl={method.impl!r} cannot run on the quantised weight of "
                f"{path or 'this layer'}; impl must be one of {', '.join(dispatch.TAKE_QUANTIZED)}"
            )
        if dtype is None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
        elif dtype not in (weight.dtype, torch.promote_types(weight.dtype, torch.float32)):
            raise TypeError(
                f"an adapter on a {weight.dtype} layer must be {weight.dtype} or float32, "
                f"got {dtype}"
            )
        adapter = Adapter(method)
        with torch.no_grad():
            method.create(adapter, self.base(path, dtype)._replace(shared=shared))
        if shared:  # how transformers' save_pretrained knows to write them once
            adapter._tied_weights_keys = dict.fromkeys(shared)
        adapter.frozen = {name for name, p in adapter.named_parameters() if not p.requires_grad}
        adapter.initialized = weight.device.type != "meta"
        return adapter.train(self.training)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Add a made adapter under ``name`` and make it the active one."""
        check_adapter_name(name)
        if name in self.adapters:
            raise ValueError(f"the layer already has an adapter {name!r}; remove it or rename")
        self.adapters[name] = adapter
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Make ``name`` the active adapter: it alone is used, and it alone is trained."""
        if name not in self.adapters:
            raise ValueError(
                f"the layer has no adapter {name!r}; it has {', '.join(self.adapters) or 'none'}"
            )
        if self.merged_adapter not in (None, name):
            raise RuntimeError(f"adapter {self.merged_adapter!r} is merged; call unmerge first")
        self.active_adapter = name
        for other, adapter in self.adapters.items():
            for tensor_name, tensor in adapter.named_parameters():
                tensor.requires_grad_(other == name and tensor_name not in adapter.frozen)  # type: ignore[operator]

    def check_mergeable(self, path: str = "", requantize: bool = True) -> None:
        """Raise ValueError where the active adapter is no linear map of x, and where the weight is
        quantised and not to be quantised anew.
        """
        if self.active_adapter is None:
            return
        if not requantize and isinstance(self.base_weight(), QuantizedWeight):
            raise ValueError(
                f"{path or 'this layer'} has a quantised weight, which merging would round anew, "
                "often by more than the adapter changes it; keep the adapter apart, or pass "
                "requantize=True and look at the error in report(model)"
            )
        adapter: Any = self.adapters[self.active_adapter]
        if adapter.method.why_not_mergeable is not None:
            raise ValueError(
                f"{path or 'this layer'} cannot be merged: {adapter.method.why_not_mergeable}; "
                "keep it unmerged, or remove the adapter"
            )
        if not adapter.initialized:
            raise RuntimeError("the adapter has no values yet; call decomp_kernels.initialize")

    def merge(self, keep_base: bool = True, path: str = "", requantize: bool = False) -> None:
        """Write the active adapter into the weight.  With keep_base, ``unmerge`` is exact.

        The merged values are a new Parameter: a weight tied to another module is left alone.
        requantize: a quantised weight is refused without it, for merging rounds it anew.
        """
        if self.merged_adapter is not None or self.active_adapter is None:
            return
        self.check_mergeable(path, requantize)
        weight, bias = self.merged_values(path)
        kept = (self.held_weight(), None if self.bias is None else _on_host(self.bias))
        self.kept_base = kept if keep_base else None
        self.hold_weight(weight)
        if bias is not None:
            trained = self.bias is not None and self.bias.requires_grad
            self.bias = nn.Parameter(bias.clone(), requires_grad=trained)
        self.merged_adapter = self.active_adapter

    @torch.no_grad()
    def merged_values(self, path: str = "") -> tuple[Tensor, Tensor | None]:
        """(weight [out, in], bias) of the plain linear that computes what this layer does."""
        adapter: Any = self.adapters[self.active_adapter]  # type: ignore[index]
        self.check_mergeable(path)
        weight, bias = adapter.method.merged(adapter, self.base(path))
        for what, values in (("weight", weight), ("bias", bias)):
            if values is not None and not torch.isfinite(values).all():
                raise ValueError(
                    f"the merged {what} of {path or 'this layer'} would hold NaN or infinity; "
                    "nothing was changed; look at the adapter's values"
                )
        return weight, bias

    def held_weight(self) -> Any:
        """What ``put_back_weight`` takes, to be exactly as now."""
        return _on_host(self.weight)

    def hold_weight(self, weight: Tensor) -> None:
        """Have an [out, in] weight of other values."""
        self.weight = nn.Parameter(self.stored(weight), requires_grad=self.weight.requires_grad)

    def put_back_weight(self, held: Any) -> None:
        self.weight = _as_parameter(held, self.weight)

    def as_base_weight(self, held: Any) -> Tensor | QuantizedWeight:
        """A held weight as [out, in], in the dtype that the model has been converted to since."""
        # ``stored`` turns [out, in] into the module's layout and, as a transposition, back as well.
        return self.stored(held.detach().to(self.weight.dtype))

    def gathered_weight(self, values: Tensor) -> Tensor | QuantizedWeight:
        """``base_weight`` of the whole values of a parameter that lies in shards."""
        return self.as_base_weight(values)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.  Refused where merge did not keep it."""
        if self.merged_adapter is None:
            return
        if self.kept_base is None:
            raise RuntimeError(
                "the base weight was not kept: (W + d) - d is not W; merge with keep_base=True, "
                "or load the base model again"
            )
        weight, bias = self.kept_base
        self.put_back_weight(weight)
        if bias is None:
            self.bias = None
        elif self.bias is not None:
            self.bias = _as_parameter(bias, self.bias)
        self.merged_adapter = self.kept_base = None

    def remove(self) -> None:
        """Become the plain module again: merged values stay, unmerged adapters are dropped."""
        for name in ("adapters", "active_adapter", "disabled", "merged_adapter", "kept_base"):
            delattr(self, name)
        self.__dict__.pop("requantization_error", None)
        hooks: Any = self._forward_hooks  # type: ignore[attr-defined]
        for key in [key for key, hook in hooks.items() if hook is _stay_in_python]:
            del hooks[key]
        self.__class__ = plain_class(self)  # type: ignore[assignment]

    def keep_from_fast_path(self) -> None:
        """Make the layer around this one call it: for nn.TransformerEncoderLayer.

        In evaluation that class hands its linears' weights to one library call, which knows nothing
        of adapters, unless a module inside it has a hook.
        """
        if _stay_in_python not in self._forward_hooks.values():  # type: ignore[attr-defined]
            self.register_forward_hook(_stay_in_python)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "disabled": 0}  # a copy made inside ``disable`` is not in it

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """The base weight may have other values now: say so to what was derived from it."""
        if self.merged_adapter is None:
            for adapter in self.adapters.values():
                adapter.method.refresh(adapter, self.base())  # type: ignore[operator, union-attr]

    def extra_repr(self) -> str:
        merged = ", merged" if self.merged_adapter is not None else ""
        return f"{super().extra_repr()}, active_adapter={self.active_adapter!r}{merged}"  # type: ignore[misc]


class DecomposedLinear(Decomposed, nn.Linear):  # type: ignore[misc]
    """``linear`` with ``method`` on it: y as factors.Factors says, same parameters, same names.

    linear: a plain nn.Linear, whose Parameter objects are shared, and frozen.  method: an instance
    such as ``SSB()`` or ``LoRA(r=16, alpha=32)``.  dtype: of the adapter's matrices; None is
    float32 on a bf16 or fp16 layer (PEFT's default) and the layer's own dtype otherwise.
    """

    def __init__(
        self,
        linear: nn.Linear,
        method: Method,
        *,
        dtype: torch.dtype | None = None,
        adapter_name: str = "default",
    ) -> None:
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear must be a plain torch.nn.Linear, got {type(linear).__name__}; "
                "use decomp_kernels.adapt(model, ...) for a whole model"
            )
        check_method(method)
        check_adapter_name(adapter_name)
        nn.Module.__init__(self)
        _share_state(self, linear)
        put_on(self, DecomposedLinear)
        self.attach(adapter_name, self.make_adapter(method, dtype=dtype))
        self.requires_grad_(False)
        self.set_adapter(adapter_name)


def put_on(module: Any, cls: type[Decomposed]) -> None:
    """Make ``module`` an instance of ``cls`` with no adapter yet."""
    module.__class__ = cls
    module.adapters = nn.ModuleDict().train(module.training)
    module.active_adapter = module.merged_adapter = module.kept_base = None
    module.disabled = 0


def _share_state(made: nn.Module, module: nn.Module) -> None:
    """Give ``made`` all that ``module`` has, the same tensors in containers of its own."""
    for name, value in vars(module).items():
        made.__dict__[name] = value.copy() if isinstance(value, dict) else value


def _stay_in_python(*_: Any) -> None:
    """A forward hook that does nothing but be there."""


def stand_in(module: nn.Module, cls: type[Decomposed]) -> Any:
    """What ``module`` would be as a ``cls``, on the same parameters, without changing it."""
    made: Any = nn.Module()
    _share_state(made, module)
    put_on(made, cls)
    return made


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted modules of ``model``, by path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Decomposed)}


def decomposed_class(module: nn.Module) -> type[Decomposed] | None:
    """The class that adapts exactly this module's class, None where there is none."""
    if type(module) is nn.Linear and not is_torchao(module._parameters.get("weight")):
        return DecomposedLinear
    if is_quantized(module):
        from decomp_kernels.quantized_linear import decomposed_quantized_class

        return decomposed_quantized_class(module)
    if f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D":
        from decomp_kernels.conv1d import DecomposedConv1D

        return DecomposedConv1D
    return None


def plain_class(module: Decomposed) -> type[nn.Module]:
    """The class that the module had before it was adapted, whatever was mixed in since."""
    mro = type(module).__mro__
    after = mro[mro.index(Decomposed) + 1 :]
    return next(cls for cls in after if issubclass(cls, nn.Module))


def check_method(method: object) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an instance such as SSB() or LoRA(r=16), got {method!r}; "
            "decomp_kernels.methods() lists them"
        )


def check_adapter_name(name: str) -> None:
    """Names become parts of state-dict keys, attributes and files."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
        raise ValueError(f"an adapter's name must be 1 to 64 letters, digits, _ or -, got {name!r}")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter cannot be named {name!r}: nn.ModuleDict has a method of it")


def _on_host(tensor: nn.Parameter) -> Tensor:
    """The Parameter object itself where it is on the host already, so that ties survive."""
    return tensor if tensor.device.type == "cpu" else tensor.detach().cpu()


def _as_parameter(kept: Tensor, now: nn.Parameter) -> nn.Parameter:
    if isinstance(kept, nn.Parameter) and (kept.device, kept.dtype) == (now.device, now.dtype):
        return kept
    return nn.Parameter(kept.detach().to(now.device, now.dtype), requires_grad=now.requires_grad)
