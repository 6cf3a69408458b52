"""The passes of the native library: what is bound by memory around the base GEMM.

Maths: reference/decomposed_linear.py.  One call each, on the CPU and on CUDA devices; the mask of
dropout is made inside.  csrc/ops/<name>.cpp checks the arguments.
"""

import torch
from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.kernels.over_dy import Walked


def down_projection(
    x: Tensor,
    down: Tensor,
    core: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(t, v) in down's dtype: t [M, r] = drop(x) down^T, v = phi(t) * core * scale.

    x [M, K] row-major, down [r, K].  v is t itself where nothing is to be done to it.
    """
    core = None if core is None else core.float()
    t, v = native_library.ops().down_projection(
        x, down.contiguous(), core, seed, scale, dropout, activation
    )
    return t, t if v.dim() == 1 else v


def column_walk(
    big: Tensor,
    right: Tensor | None,
    left: Tensor | None,
    other: Tensor | None,
    scale: Tensor | None,
    column_sum: bool,
    *,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Walked:
    """What one read of big [M, N], row-major, gives; other [M, N] is of its dtype.

    right [N, r] and left [M, r] have one dtype, big's or float32.  The mask acts on c alone, which
    is not divided by the kept fraction.
    """
    found = native_library.ops().column_walk(
        big,
        None if right is None else right.contiguous(),
        None if left is None else left.contiguous(),
        None if other is None else other.contiguous(),
        None if scale is None else scale.float(),
        seed, dropout, column_sum,
    )  # fmt: skip
    asked = (right, left, other, True if column_sum else None, scale)
    return Walked(*(None if what is None else one for what, one in zip(asked, found, strict=True)))


def rank_walk(x: Tensor, left: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """left^T drop(x), [r, K] float32, not divided by the kept fraction.  left [M, r]."""
    found = native_library.ops().column_walk(
        x, None, left.contiguous(), None, None, seed, dropout, False, True
    )
    return found[1]


def up_expansion(
    v: Tensor,
    small: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """bias + addend + mask(v @ small), [M, N] in ``dtype`` with one rounding.

    v [M, r] and small [r, N] of one dtype, ``dtype`` or float32; addend [M, N] in ``dtype``.
    """
    return native_library.ops().up_expansion(
        v.contiguous(),
        small.contiguous(),
        None if bias is None else bias.float(),
        None if addend is None else addend.contiguous(),
        seed, dropout, dtype,
    )  # fmt: skip
