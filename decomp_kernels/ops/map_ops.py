"""The closed set of weight maps and the operators that build and contract them.

Looked up by ``WeightMap.op``.  Each gives check(m, weight), build(m, weight, impl),
contract(m, weight, g, x, impl), dense(m, weight) and ACTS_ON_INPUT.  Where that is True, W_eff is
W after a linear map of x: forward(m, x, impl) is that map, and backward(m, gx, x, impl) does the
work of contract, and makes dx, from gx = g W.
"""

from types import ModuleType

from decomp_kernels.ops import (
    block_rotate,
    double_hadamard,
    hadamard,
    scatter,
    singular_diagonal,
)

MAP_OPS: dict[str, ModuleType] = {
    "hadamard": hadamard,
    "double_hadamard": double_hadamard,
    "block_rotate": block_rotate,
    "singular_diagonal": singular_diagonal,
    "scatter": scatter,
}
