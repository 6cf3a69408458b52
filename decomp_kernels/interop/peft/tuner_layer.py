"""A linear that PEFT has wrapped, with our adapters on it: the same operator, PEFT's bookkeeping.

    state dict    base_layer.weight, .bias               the wrapped linear, untouched
                  dk_<method>_adapters.<name>.<tensor>   down, up, core, in_scale, out_scale, ...

The wrapped module stays a plain nn.Linear or Conv1D.  What ``Decomposed`` knows about making and
merging adapters is asked of a stand-in for it on the same parameters.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from decomp_kernels.linear import Decomposed, check_adapter_name, decomposed_class, stand_in
from decomp_kernels.methods.base import Adapter, Base, Holder, Method


class DecomposedTunerLayer(nn.Module, BaseTunerLayer, Holder):
    """base_layer: the linear to wrap.  prefix: PEFT's, of the method, such as "dk_ssb_"."""

    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, prefix: str, path: str) -> None:
        super().__init__()
        kind = decomposed_class(base_layer)
        if kind is None:
            raise ValueError(
                f"{path} is a {type(base_layer).__name__}, and must be a plain nn.Linear or a "
                "Conv1D without another PEFT adapter; leave it out with exclude_modules"
            )
        self.kind = kind
        self.base_layer = base_layer
        self.adapter_layer_names = (f"{prefix}adapters",)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.kept_base: tuple[Tensor, Tensor | None] | None = None
        weight = self.base().weight
        self.out_features, self.in_features = weight.shape  # as users of nn.Linear expect
        self.train(base_layer.training)

    @property
    def adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def working(self, names: list[str]) -> str | None:
        """The one of ``names`` that this layer has; two at once are refused."""
        found = [name for name in names if name in self.adapters]
        if len(found) > 1:
            raise ValueError(
                f"one adapter can be active on a layer, got {', '.join(found)}: what two of them "
                "would compute together is not defined for these methods; set or merge them one "
                "at a time"
            )
        return found[0] if found else None

    def current(self) -> Adapter | None:
        name = self.working(self.active_adapters)
        return None if name is None else self.adapters[name]  # type: ignore[return-value]

    def base(self, path: str = "", dtype: torch.dtype | None = None) -> Base:
        weight = self.kind.base_weight(self.base_layer)  # type: ignore[arg-type]
        return Base(weight, self.base_layer.bias, weight.dtype if dtype is None else dtype, path)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter = None if self.disable_adapters or self.merged else self.current()
        if adapter is None:
            return self.base_layer(x)
        if not adapter.initialized:
            raise RuntimeError(
                f"the adapter {self.active_adapters} was made on the meta device and has no values "
                "yet; load an adapter, or load the base weights before get_peft_model"
            )
        return adapter.method.forward(adapter, self.base(), x, self.training)

    def update_layer(self, name: str, method: Method, path: str) -> None:
        """Make an adapter of ``method`` under ``name``; PEFT makes it active, or not."""
        check_adapter_name(name)
        made = stand_in(self.base_layer, self.kind).make_adapter(method, path)
        self.adapters[name] = made.train(self.training)

    @torch.no_grad()
    def cast_adapter(self, name: str, dtype: torch.dtype | None) -> None:
        """Convert an adapter's tensors to what its method makes of them for matrices in ``dtype``.

        None is float32 on a bf16 or fp16 layer.  Scales are float32 or wider whatever it is.
        """
        adapter: Any = self.adapters[name]
        linear = nn.Module()
        for tensor_name, tensor in self.base_layer._parameters.items():
            shape = None if tensor is None else nn.Parameter(tensor.to("meta"), False)
            linear.register_parameter(tensor_name, shape)
        like = stand_in(linear, self.kind).make_adapter(adapter.method, dtype=dtype).state_dict()
        for tensor_name, tensor in adapter.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(like[tensor_name].dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """PEFT's would cast scales to bf16 too, and then what was just loaded into them."""
        if adapter_name not in self.adapters:
            return
        adapter = self.adapters[adapter_name]
        if not any(tensor.is_meta for tensor in adapter.state_dict().values()):
            adapter.to(self.base().weight.device if device is None else device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write one adapter into the weight, which is kept, so that ``unmerge`` is exact.

        float32 arithmetic and one rounding.  That the result is finite is always checked.
        """
        name = self.working([*self.merged_adapters, *check_adapters_to_merge(self, adapter_names)])
        if name is None or self.merged:
            return
        linear = self._merging(name)
        linear.merge()
        self.kept_base, self.merged_adapters = linear.kept_base, [name]

    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        if not self.merged:
            return
        linear = self._merging(self.merged_adapters[0])
        linear.kept_base, linear.merged_adapter = self.kept_base, self.merged_adapters[0]
        linear.unmerge()
        self.kept_base, self.merged_adapters = None, []

    def _merging(self, name: str) -> Decomposed:
        """The wrapped linear as a ``Decomposed``: what it does to its weight, it does to ours."""
        linear: Decomposed = stand_in(self.base_layer, self.kind)
        linear._parameters = self.base_layer._parameters  # type: ignore[attr-defined]
        linear.adapters, linear.active_adapter = self.adapters, name
        return linear
