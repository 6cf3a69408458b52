"""When a decomposed linear is one compiled call, its autograd node and all (csrc/autograd).

That composition makes the calls of kernels/aten/decomposed_linear.py in their order, so its bits
are those of impl="aten"; what it saves is the interpreter.  It takes plain tensors of one dtype on
a CPU, a frozen weight and no more than scales and a linear branch.  Compilers are shown the
operators of ops/decomposed_linear.py, and so is whatever looks at calls as a tensor subclass does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from decomp_kernels import dispatch, native_library
from decomp_kernels.ops.implementation import work

_PLAIN = {Tensor, Parameter, type(None)}


def autograd_node(x: Tensor, terms: tuple[Any, ...], activation: str, impl: str) -> Any:
    """The operator that computes this call forward and backward; None where there is none.

    terms: weight, bias, down, up, core, in_scale, out_scale, of which all but weight may be None.
    """
    weight, _, down, *_, out_scale = terms
    if (
        torch.compiler.is_compiling()
        or activation != "identity"
        or not x.is_cpu
        or type(x) not in _PLAIN
        or not _PLAIN.issuperset(map(type, terms))
        or weight.requires_grad
        or (down is not None and down.dtype != x.dtype)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    node = native_library.autograd_node()
    if node is None:
        return None
    asked = work("decomposed_linear", "forward", x, weight, down, 0.0, out_scale)
    return node if dispatch.library_calls(x, impl, asked) else None
