"""What a compiler that traces a call knows of its numbers.

torch.compile makes a symbol of a Python float that has changed between calls, and torch.export one
of a dynamic size.  An operator's float argument turns a symbol back into a number, and each new
value into a new compilation; a comparison of sizes makes the program one for these sizes alone.

Where nothing needs a gradient, torch.compile (2.13) calls a Function's forward without its ctx if
it is given as many values as the signature has names.  A forward with any number of tensors can
meet that number, unless it has no other names but *tensors.
"""

import torch
from torch import Tensor


def is_symbol(scale: float) -> bool:
    """Whether ``scale`` is no number to the compiler."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # compilers have it loaded

    return not has_static_value(scale)


def with_number(
    scale: float, core: Tensor | None, down: Tensor | None
) -> tuple[float, Tensor | None]:
    """(scale, core) of the same branch, with a scale that is a number: a symbol goes into core."""
    if down is None or not is_symbol(scale):
        return float(scale), core
    if core is None:
        wide = torch.promote_types(down.dtype, torch.float32)
        core = torch.ones(down.shape[0], dtype=wide, device=down.device)
    return 1.0, core * scale


def less(a: int, b: int) -> bool:
    """a < b.  An exported program has one way for all its sizes: there False unless always true."""
    if not torch.compiler.is_exporting():
        return a < b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a < b)
