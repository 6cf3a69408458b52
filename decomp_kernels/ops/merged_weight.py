"""The weight of the plain linear that an adapted layer is, where its branch is linear.

Formula: reference/decomposed_linear.py.  It is made once and has no gradient, so it is no operator
of torch's.
"""

import torch
from torch import Tensor

from decomp_kernels import dispatch
from decomp_kernels.ops.implementation import files, implementation, work
from decomp_kernels.reference import decomposed_linear as reference

_FILES = files(triton="merged_weight", native="merged_weight")


def merged_weight(
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
    impl: str,
) -> Tensor:
    """out_scale * (W + scale * up core down) * in_scale, [N, K], rounded once to W's dtype.

    Every implementation computes in float32.  A weight that ``impl`` cannot run on, such as one
    that was moved to the CPU to be merged, is merged by the definition.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    # On a quantised base they may have another 16-bit dtype than W, which no implementation takes.
    down, up, core, in_scale, out_scale = (
        factor if factor is None or factor.dtype == weight.dtype else factor.to(wide)
        for factor in (down, up, core, in_scale, out_scale)
    )
    impl = dispatch.named(impl)
    if impl != "auto" and dispatch.why_not(weight, impl):
        impl = "reference"
    asked = work("merged_weight", "forward", weight, weight, down, out_scale=out_scale)
    chosen = implementation(weight, impl, reference, reference, _FILES, asked)
    with dispatch.on(weight.device):
        return chosen.merged_weight(weight, down, up, core, in_scale, out_scale, scale)
