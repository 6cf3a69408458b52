"""out_scale * (W + scale * B core A) * in_scale by the native library, in one pass over W.

Definition: merged_weight of reference/decomposed_linear.py.
"""

import torch
from torch import Tensor

from decomp_kernels import native_library


def merged_weight(
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """[N, K] in W's dtype, rounded once."""
    if down is None or up is None:
        down = up = core = None
    return native_library.ops().merged_weight(
        weight.contiguous(),
        None if down is None else down.contiguous(),
        None if up is None else up.contiguous(),
        _vector(core),
        _vector(in_scale),
        _vector(out_scale),
        scale,
    )


def _vector(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(torch.float32).contiguous()
