"""An adapter's files in another form, with the base model or without it.

folder  ->  Description, tensors  ->  (as LoRA)  ->  folder
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from decomp_kernels.interop.contents import contents
from decomp_kernels.interop.description import Description
from decomp_kernels.interop.files import load_adapter, read_folder, save_adapter, write_folder
from decomp_kernels.interop.installing import install
from decomp_kernels.interop.lowrank import LoRAReport, as_lora
from decomp_kernels.interop.stand_in_model import stand_in_model

KINDS = ("peft", "decomp_kernels", "lora")


def convert(
    source: Path, target: Path, to: str, base: nn.Module | None = None, rank: int | None = None
) -> LoRAReport | None:
    """Write the adapter in ``source`` into ``target`` in another form.

    to: "peft" and "decomp_kernels" are the formats of ``save_adapter``, "lora" is plain LoRA in
    PEFT's format, see ``as_lora``, whose report is returned.  base: the model it was trained on,
    without adapters; it gets this one.  Without it the new files do not say what the base was, and
    updates that depend on its values are refused.
    """
    form = "peft" if to == "lora" else to
    if base is not None:
        load_adapter(base, source)
        report = as_lora(base, rank=rank) if to == "lora" else None
        save_adapter(base, target, format=form)
        return report
    description, read_tensors = read_folder(source)
    tensors = read_tensors()
    report = None
    if to == "lora":
        description, tensors, report = _lora_of(description, tensors, rank)
    write_folder(target, description, tensors, form, None)
    return report


def _lora_of(
    description: Description, tensors: dict[str, Tensor], rank: int | None
) -> tuple[Description, dict[str, Tensor], LoRAReport]:
    """On a stand-in for the base; what is trained beside the layers is passed on as it is."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith("layers.")}
    others = {key: tensor for key, tensor in tensors.items() if key not in own}
    table = {key: description.tensors[key] for key in own}
    model = stand_in_model(description, own)
    alone = replace(description, modules={}, biases=[], tensors=table)
    install(model, alone, lambda: own, None, allow_other_base=True)
    report = as_lora(model, rank=rank)
    made, lora = contents(model, None)
    layers = {
        path: (index, description.layers[path][1]) for path, (index, _) in made.layers.items()
    }
    made = replace(
        made, layers=layers, modules=description.modules, biases=description.biases,
        tensors=made.tensors | {key: description.tensors[key] for key in others},
    )  # fmt: skip
    return made, lora | others, report
