"""How PEFT finds again, in a base model, the modules that an adapter is for."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from decomp_kernels.interop.description import Description
from decomp_kernels.interop.peft.configuration import exactly
from decomp_kernels.linear import adapted_layers
from decomp_kernels.saved_modules import trained_copies
from decomp_kernels.targets import matches

# What PEFT's classes for these tasks train whole, asked for or not, where the model has it.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {  # the end of a transformers class's name
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class BaseFacts(NamedTuple):
    """What a file says of the base, where the base is at hand."""

    names: list[str]  # of all its modules, without the adapters
    name_or_path: str | None
    task: str | None


def facts_of(model: nn.Module) -> BaseFacts:
    """The base of a model, adapted or not."""
    adapters = tuple(f"{path}.adapters".lstrip(".") for path in adapted_layers(model))
    copies = trained_copies(model)
    names = []
    for name, _ in model.named_modules():
        inside = next((path for path in copies if name.startswith(f"{path}.")), None)
        if inside is not None:
            original = f"{inside}.original."
            if name.startswith(original):
                names.append(f"{inside}.{name.removeprefix(original)}")
        elif name and not name.startswith(adapters):
            names.append(name)
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    task = next((task for end, task in _TASKS.items() if kind.endswith(end)), None)
    if kind.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        task = "SEQ_2_SEQ_LM"
    return BaseFacts(names, getattr(config, "name_or_path", None) or None, task)


def named(description: Description, facts: BaseFacts | None) -> dict[str, Any]:
    """The fields of a configuration that say which modules, and of which base."""
    modules = list(description.modules)
    for path in description.layers:
        if not path:
            raise ValueError("PEFT adapts modules of a model, and this model is one linear itself")
        hidden = [name for name in modules if re.match(rf"(^|.*\.){name}($|\..*)", path)]
        if hidden:
            raise ValueError(
                f"PEFT does not adapt {path}, as modules_to_save={hidden[0]!r} matches it by "
                "PEFT's rule; use the format of decomp_kernels"
            )
    if facts is not None:
        outside = [n for n in facts.names if not any(n.startswith(f"{m}.") for m in modules)]
        for name in outside:
            if name not in modules and any(name.endswith(module) for module in modules):
                raise ValueError(
                    f"PEFT would train {name} whole too, as modules_to_save matches by a name's "
                    "last letters; use the format of decomp_kernels"
                )
    return {
        "target_modules": targets(list(description.layers), facts, modules),
        "modules_to_save": modules or None,
        "base_model_name_or_path": None if facts is None else facts.name_or_path,
        "task_type": None if facts is None else _task(facts, modules),
    }


def targets(layers: list[str], facts: BaseFacts | None, modules: list[str]) -> str | list[str]:
    """The shortest names that match these layers of the base alone, by PEFT's rule.

    Without the base nobody knows what else a name would match: an expression of the full names.
    """
    if facts is not None:
        names = [n for n in facts.names if not any(matches(n, [m]) for m in modules)]
        last = sorted({layer.rpartition(".")[2] for layer in layers})
        for wanted in (last, sorted(layers)):
            if _found(names, wanted) == set(layers):
                return wanted
    return exactly(layers)


def _found(names: Iterable[str], wanted: list[str]) -> set[str]:
    return {name for name in names if matches(name, wanted)}


def _task(facts: BaseFacts, modules: list[str]) -> str | None:
    """A task whose class trains a head that the file does not have is left out: PEFT's loader for
    it would look for the head.
    """
    heads = _HEADS.get(facts.task or "", ())
    present = [name for name in facts.names if name.endswith(heads)] if heads else []
    missing = [
        name
        for name in present
        if name not in modules and not any(name.startswith(f"{m}.") for m in modules)
    ]
    return None if missing else facts.task
