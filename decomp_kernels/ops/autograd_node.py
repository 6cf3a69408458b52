"""When a decomposed linear is one compiled call, its autograd node and all (csrc/autograd).

That call makes those of kernels/aten/decomposed_linear.py, or of kernels/native's, in their order,
so its bits are those of impl="aten" or "native:passes"; what it saves is the interpreter.  It takes
plain tensors on a CPU, a frozen weight and no more than scales and a linear branch; dropout and a
float32 branch on a bf16 layer where both directions are native.  Compilers are shown the operators
of ops/decomposed_linear.py, and so is whatever looks at calls as a tensor subclass does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from decomp_kernels import dispatch, native_library
from decomp_kernels.ops.implementation import work

_PLAIN = {Tensor, Parameter, type(None)}
FORWARD_BY_PASSES, BACKWARD_BY_PASSES = 1, 2  # bits of the node's argument ``passes``
_FORMS = ("aten", "native:passes")


def autograd_node(
    x: Tensor, terms: tuple[Any, ...], seed: Tensor | None, activation: str, impl: str
) -> tuple[Any, int] | None:
    """The operator that computes this call forward and backward, and its argument ``passes``: the
    directions that run by host kernels.  None where there is none.

    terms: weight, bias, down, up, core, in_scale, out_scale, of which all but weight may be None.
    seed: of dropout, None where nothing is dropped.
    """
    weight, _, down, *_, out_scale = terms
    if (
        torch.compiler.is_compiling()
        or activation != "identity"
        or not x.is_cpu
        or type(x) not in _PLAIN
        or not _PLAIN.issuperset(map(type, terms))
        or type(seed) not in _PLAIN
        or weight.requires_grad
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    node = native_library.autograd_node()
    if node is None:
        return None
    dropout = 0.0 if seed is None else 1.0  # the table knows only whether there is any
    asked = work("decomposed_linear", "forward", x, weight, down, dropout, out_scale)
    forward, backward = dispatch.both_ways(x, impl, asked)
    if forward not in _FORMS or backward not in _FORMS:
        return None
    passes = 0 if forward == "aten" else FORWARD_BY_PASSES
    passes |= 0 if backward == "aten" else BACKWARD_BY_PASSES
    plain = seed is None and (down is None or down.dtype == x.dtype)
    return (node, passes) if plain or passes == FORWARD_BY_PASSES | BACKWARD_BY_PASSES else None
