"""Parameter-efficient fine-tuning as decompositions of one frozen weight (arXiv 2407.05417)."""

import typing

from decomp_kernels.constraints import mpc_loss
from decomp_kernels.explanation import explain
from decomp_kernels.factors import Factors
from decomp_kernels.interop.description import AdapterFileError
from decomp_kernels.interop.files import load_adapter, save_adapter
from decomp_kernels.interop.peft.accelerate import accelerate, restore
from decomp_kernels.interop.report import report
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods import METHODS, methods
from decomp_kernels.model import (
    adapt,
    disable,
    initialize,
    merge,
    print_trainable_parameters,
    remove,
    set_adapter,
    unmerge,
)
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.grouped_linear import decomposed_linears
from decomp_kernels.optimizer import decay_to_one, param_groups
from decomp_kernels.quantization import quantize
from decomp_kernels.quantized_linear import QuantizedLinear
from decomp_kernels.quantized_weight import QuantizedWeight

__version__ = "0.1.0"

if typing.TYPE_CHECKING:

    def __getattr__(name: str) -> typing.Any:
        """The method classes: the registry has them, and type checkers cannot read it."""
else:
    globals().update({cls.__name__: cls for cls in METHODS.values()})
