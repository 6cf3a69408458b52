"""How PEFT (github.com/huggingface/peft) spells a method: its configuration and its tensors.

Only names stand here, so that nothing below interop needs PEFT; tests hold them to it.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ADAPTER = "*"  # where a tensor's path has the adapter's name in a model, and nothing in a file

# How PEFT lays a tensor of ours out: (from PEFT's to ours, from ours to PEFT's).
LAYOUTS = {
    "same": (lambda t: t, lambda t: t),
    "column": (lambda t: t[:, 0], lambda t: t[:, None]),  # [n] stands as [n, 1]
    "row": (lambda t: t[0], lambda t: t[None]),  # [n] stands as [1, n]
    "transposed": (lambda t: t.T, lambda t: t.T),
    # int64 [n] is the first row of int32 [2, n], or float32 from Windows, and another the second.
    "first": (lambda t: t[0].long(), lambda t: t[None].int()),
    "second": (lambda t: t[1].long(), lambda t: t[None].int()),
}


@dataclass(frozen=True)
class PeftTensor:
    """path: in PEFT's layer, such as "lora_A.*.weight".  layout: a key of LAYOUTS.

    shared: it exists once for the whole model, and in a file stands beside the layers.  Tensors of
    ours with one path are its parts, in their order, along its first dimension.  in_file: the name
    in a file, where that is not the path without the adapter's name.
    """

    path: str
    layout: str = "same"
    shared: bool = False
    in_file: str | None = None

    def file_key(self) -> str:
        """The name in a file, below the layer's."""
        return self.in_file or self.path.replace(f".{ADAPTER}", "")

    def ours(self, theirs: Tensor) -> Tensor:
        return LAYOUTS[self.layout][0](theirs)

    def theirs(self, ours: Tensor) -> Tensor:
        return LAYOUTS[self.layout][1](ours)


@dataclass(frozen=True)
class PeftForm:
    """A method's PEFT configuration.

    tensors: our tensor -> PEFT's; a layer may lack some of them.  options: our option -> the field
    of the configuration.  fixed: fields that must have these values for it to be this method.
    ours: values of our options with which the method computes exactly PEFT's function, training
    included.  With others it differs in training alone; but on a layer with a bias it is another
    function if bias_needs_ours.

    per_layer: our options that the configuration can have by layer (rank_pattern, alpha_pattern).
    layers: the field that lists this method's layers, where two methods share a configuration.
    bias_only: how its ``bias`` field says "those of the adapted layers"; empty where it has none.
    conv1d: PEFT puts it on GPT-2's Conv1D too.
    """

    config: str
    peft_type: str
    tensors: dict[str, PeftTensor]
    options: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    bias_needs_ours: bool = False
    per_layer: tuple[str, ...] = ()
    layers: str = ""
    bias_only: str = ""
    conv1d: bool = False
    note: str = ""

    def __str__(self) -> str:
        said = [f"{name}={value!r}" for name, value in self.fixed.items() if value]
        options = f"({', '.join(said)})" if said else ""
        return f"{self.config}{options}{self.note and f', {self.note}'}"
