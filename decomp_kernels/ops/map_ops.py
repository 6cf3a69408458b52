"""The closed set of weight maps and the operators that build and contract them.

Looked up by ``WeightMap.op``.  Each gives check(m, weight), build(m, weight, impl),
contract(m, weight, g, x, impl), dense(m, weight) and FROM_INPUT_GRADIENT; where that is True, the
map acts on x alone, and backward(m, gx, x, impl) does the work of contract from gx = g W.
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
