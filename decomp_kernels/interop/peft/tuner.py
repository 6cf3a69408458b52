"""PEFT methods made of ours: for SSB the configuration SSBConfig, peft_type "DK_SSB", and a tuner.

Importing this file enters them in PEFT's tables, as PEFT's own tuners do: so a pickled
configuration or model brings the registration along.
"""

from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    register_peft_method,
)
from torch import nn

from decomp_kernels.interop.peft.enum_member import add_member
from decomp_kernels.interop.peft.tuner_layer import DecomposedTunerLayer
from decomp_kernels.linear import Decomposed
from decomp_kernels.methods import METHODS
from decomp_kernels.methods.base import Method

# PEFT has SSL, but as IA3 with the layer named a second time among its feedforward_modules.
NAMED_ANEW = ("ssl",)


@dataclass
class DecomposedConfig(PeftConfig):
    """target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in
    every PEFT configuration.  target_modules=None takes PEFT's choice for LoRA on this model.
    The method's own options come after them, and are checked here.
    """

    method_class: ClassVar[type[Method]]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[peft_type(self.method_class)]
        for name in ("target_modules", "exclude_modules"):
            value: Any = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform needs target_modules as a list of names, got the expression "
                f"{self.target_modules!r}; put the layers into the expression"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern says where layers_to_transform finds its numbers, got "
                f"{self.layers_pattern!r} without layers_to_transform"
            )
        self.method()

    def method(self) -> Method:
        """Our method with these options; raises where they cannot be right."""
        names = [one.name for one in fields(self.method_class)]
        return self.method_class(**{name: getattr(self, name) for name in names})


class DecomposedTuner(BaseTuner):
    """What PEFT asks of a method over a whole model."""

    tuner_layer_cls = DecomposedTunerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's, and where a layer refuses, those before it are as they were."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for path, layer in list(model.named_modules()):
                if isinstance(layer, DecomposedTunerLayer) and adapter_name in layer.adapters:
                    del layer.adapters[adapter_name]
                    if not layer.adapters:
                        parent, _, name = path.rpartition(".")
                        setattr(model.get_submodule(parent), name, layer.base_layer)
            raise

    def _create_and_replace(
        self,
        peft_config: DecomposedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        method = peft_config.method()
        if isinstance(target, DecomposedTunerLayer):
            target.update_layer(adapter_name, method, current_key)
            return
        layer = DecomposedTunerLayer(target, self.prefix, current_key)
        layer.update_layer(adapter_name, method, current_key)
        if isinstance(parent, nn.TransformerEncoderLayer):
            Decomposed.keep_from_fast_path(layer)
        self._replace_module(parent, target_name, layer, target)

    def _layers(self) -> list[DecomposedTunerLayer]:
        return [layer for layer in self.model.modules() if isinstance(layer, DecomposedTunerLayer)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self._layers():
            layer.working(names)  # raises before any layer has changed
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self._layers():
            if adapter_name in layer.adapters:
                dtype = None if autocast_adapter_dtype else layer.base().dtype
                layer.cast_adapter(adapter_name, dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT drops these arguments in silence where a tuner does not ask for them."""
        given = [
            name for name in ("adapter_names", "alora_offsets") if kwargs.get(name) is not None
        ]
        if given:
            raise ValueError(
                f"{given[0]} cannot be given with {type(self).__name__}: one adapter serves the "
                "whole batch; call set_adapter, and the model once for each adapter"
            )
        yield


def peft_type(method: type[Method]) -> str:
    """Its name in PEFT's tables and files, in a space of our own."""
    return f"DK_{method.name.upper()}"


def _config_class(method: type[Method]) -> type[DecomposedConfig]:
    options: list[Any] = [
        (one.name, one.type, field(default=one.default)) for one in fields(method)
    ]
    assert all(one.default is not MISSING for one in fields(method)), method
    return make_dataclass(
        f"{method.__name__}Config",
        options,
        bases=(DecomposedConfig,),
        namespace={
            "method_class": method,
            "__module__": __name__,
            "__doc__": f"{method.formula} ({method.citation}): decomp_kernels.{method.__name__} as "
            f"a PEFT method.\n\n{method.__doc__}",
        },
    )


def _tuner_class(method: type[Method]) -> type[DecomposedTuner]:
    prefix = f"{peft_type(method).lower()}_"
    name = f"{method.__name__}Tuner"
    return type(name, (DecomposedTuner,), {"prefix": prefix, "__module__": __name__})


CONFIGS = {
    f"{method.__name__}Config": _config_class(method)
    for method in METHODS.values()
    if method.peft_form is None or method.name in NAMED_ANEW
}

for _config in CONFIGS.values():
    add_member(PeftType, peft_type(_config.method_class))
for _name, _config in CONFIGS.items():
    _tuner = _tuner_class(_config.method_class)
    globals().update({_name: _config, _tuner.__name__: _tuner})
    register_peft_method(
        name=peft_type(_config.method_class).lower(), config_cls=_config, model_cls=_tuner
    )
