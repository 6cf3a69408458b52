"""PEFT's adapter_config.json:  dict  ->  the method of each layer and its options, and back.

A field that is not known here must be switched off, so that a file of a variant that is not
computed here, or of a later PEFT, is refused by the field's name and never read as something else.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from decomp_kernels.interop.description import AdapterFileError
from decomp_kernels.methods.base import METHODS, Method
from decomp_kernels.peft_form import PeftForm

VERSION = "0.21.2"  # the release of PEFT whose files these are
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})
# Fields that say nothing of the function, or that other code here reads.
_FREE = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "feedforward_modules", "init_lora_weights", "init_weights", "init_ia3_weights", "eva_config",
    "loftq_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_core",
    "qalora_group_size", "mask_type", "random_seed", "save_projection", "total_step",
}  # fmt: skip
# AdaLoRA's configuration has LoRA's r and does not use it.
_UNUSED = {"ADALORA": {"r"}}
# Starts that leave the base weight as it is; "pissa", "olora", "loftq", ... take their part out.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def forms_of(config: dict[str, Any]) -> dict[str, PeftForm]:
    """The methods that this configuration is of: {name: form}, two where layers are told apart."""
    kind = config.get("peft_type")
    of_kind = {name: form for name, form in peft_forms().items() if form.peft_type == kind}
    if not of_kind:
        known = sorted({form.peft_type for form in peft_forms().values()})
        raise AdapterFileError(
            f"peft_type must be one of {', '.join(known)}, got {kind!r}; "
            "load this adapter with PEFT itself"
        )
    wrong: dict[str, list[str]] = {}
    for name, form in of_kind.items():
        wrong[name] = [f for f, value in form.fixed.items() if config.get(f, value) != value]
    found = {name: form for name, form in of_kind.items() if not wrong[name]}
    if not found:
        _refuse(config, min(wrong.values(), key=len)[0])
    used = {field for form in found.values() for field in (*form.options.values(), *form.fixed)}
    for field, value in config.items():
        free = used | _FREE | _UNUSED.get(str(kind), set())
        if field not in free and value not in _OFF:
            _refuse(config, field)
    start = config.get("init_lora_weights", True)
    if start == "mica":  # leaves the base alone and freezes B
        _refuse(config, "init_lora_weights")
    if start not in _STARTS:
        raise AdapterFileError(
            f"init_lora_weights={start!r} took a part of the base weight out, which the file does "
            "not have; save it from PEFT as plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return found


def peft_forms() -> dict[str, PeftForm]:
    return {name: cls.peft_form for name, cls in METHODS.items() if cls.peft_form is not None}


def _refuse(config: dict[str, Any], field: str) -> None:
    raise AdapterFileError(
        f"adapter_config.json has {field}={config[field]!r}, which decomp_kernels does not "
        "compute; load the adapter with PEFT itself. (Where the field matters in training alone, "
        "such as a dropout, set it to 0 in the file to load the adapter for inference.)"
    )


def method_of(forms: dict[str, PeftForm], config: dict[str, Any], path: str) -> str:
    """Which of the forms this layer has: that which a field lists it for, else the other."""
    for name, form in forms.items():
        listed = config.get(form.layers) if form.layers else None
        if isinstance(listed, str):
            if re.fullmatch(listed, path):
                return name
        elif any(path.endswith(one) for one in listed or ()):  # PEFT's rule, without a dot
            return name
    return next(name for name, form in forms.items() if not form.layers)


def options_of(name: str, form: PeftForm, config: dict[str, Any], path: str) -> dict[str, Any]:
    """Our options of one layer."""
    cls: Any = METHODS[name]
    defaults = {field.name: field.default for field in fields(cls)}
    found = {}
    for option, field in form.options.items():
        value = config.get(field, defaults[option])
        pattern = config.get(f"{_pattern(option)}_pattern") if option in form.per_layer else None
        for key, other in (pattern or {}).items():  # the first key that matches wins
            if re.match(rf"(.*\.)?({key})$", path):
                value = other
                break
        found[option] = None if value == 0 and defaults[option] is None else value
    return {**found, **form.ours}


def _pattern(option: str) -> str:
    return {"r": "rank", "alpha": "alpha"}[option]


def fields_of(
    methods: dict[str, Method], without_bias: set[str]
) -> tuple[PeftForm, dict[str, Any]]:
    """(a form, the fields that say what the layers compute) for the methods of layers by path.

    without_bias: the layers whose linear is known to have none.
    """
    forms = {path: _form_of(method, path in without_bias) for path, method in methods.items()}
    first = next(iter(forms.values()))
    config: dict[str, Any] = {"peft_type": first.peft_type}
    for form in forms.values():
        if (form.config, form.fixed) != (first.config, first.fixed):
            raise ValueError(
                f"the layers must be of one PEFT configuration, and {form} and {first} are two; "
                "save the model in the format of decomp_kernels, or give each method an adapter"
            )
        config |= form.fixed
    options = dict.fromkeys(option for form in forms.values() for option in form.options)
    for option in options:
        values = {
            path: _number(getattr(methods[path], option))
            for path, form in forms.items()
            if option in form.options
        }
        kinds = list(values.values())
        usual = max(kinds, key=kinds.count)
        others = {path: value for path, value in values.items() if value != usual}
        config[first.options[option]] = usual
        if others and option not in first.per_layer:
            path, value = next(iter(others.items()))
            raise ValueError(
                f"{first.config} has one {first.options[option]} for all layers: {option} must be "
                f"{usual!r} on {path} too, got {value!r}; use the format of decomp_kernels"
            )
        if option in first.per_layer:
            pattern = {exactly([path]): value for path, value in others.items()}
            config[f"{_pattern(option)}_pattern"] = pattern
    for field in {form.layers for form in peft_forms().values() if form.config == first.config}:
        listed = [path for path, form in forms.items() if form.layers == field]
        if field:
            config[field] = exactly(listed) if listed else []
    return first, config


def exactly(paths: Iterable[str]) -> str:
    """The expression that matches these paths and no other, in target_modules and in patterns."""
    escaped = [re.escape(path) for path in paths]
    return f"^{escaped[0]}" if len(escaped) == 1 else f"^({'|'.join(escaped)})"


def _form_of(method: Method, without_bias: bool) -> PeftForm:
    """The form of a method whose options are all PEFT's, else ValueError."""
    form = type(method).peft_form
    name = type(method).__name__
    if form is None:
        raise ValueError(
            f"PEFT has no {name}: it cannot be saved in its format.  Where the update is of low "
            "rank, as_lora(model) and `decomp-kernels convert --to lora` make a LoRA of it; "
            "register_with_peft() gives PEFT the method; the format of decomp_kernels has them all"
        )
    for field in fields(method):
        if field.name == "impl" or field.name in form.options:
            continue
        value = getattr(method, field.name)
        if field.name not in form.ours:
            must = field.default
        elif form.bias_needs_ours and not without_bias:
            must = form.ours[field.name]
        else:
            continue
        if value != must:
            raise ValueError(
                f"{name}({field.name}={value!r}) cannot be saved as PEFT's {form.config}, which "
                f"has {must!r} there; use the format of decomp_kernels"
            )
    return form


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
