"""Column scales and column sums in one library pass each, float32 arithmetic, one rounding.

A batch norm in inference mode with mean 0 is  out = x * scale + shift  by column;
its backward gives  dy * scale,  sum_rows dy * x  and  sum_rows dy  from one read of dy and x.
The library computes both in float32 for bf16 and fp16 tensors with float32 scales, where a plain
multiply would first convert the whole tensor.
"""

import torch
from torch import Tensor

SUMMED_ROWS = 4096  # that are added one after another: sums of more are made of such parts


def scale_columns(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """x [M, N] * scale [N] + shift [N], in x's dtype."""
    if x.numel() == 0:  # the library divides by the number of rows
        return torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = scale.to(wide)
    shift = None if shift is None else shift.to(wide)
    if x.dtype == wide:
        return x * scale if shift is None else torch.addcmul(shift, x, scale)
    zero = torch.zeros_like(scale)  # the mean, and the variance: 1 / sqrt(0 + 1) is 1
    return torch.native_batch_norm(x, scale, shift, zero, zero, False, 0.0, 1.0)[0]


def scale_columns_backward(
    dy: Tensor, x: Tensor | None, scale: Tensor, *, scaled: bool, summed: bool, shift: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy * scale, sum_rows dy * x, sum_rows dy), each None where it is not asked for.

    dy, x [M, N].  The sums are float32 (float64 for float64).  x may be None unless ``summed``.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    if dy.numel() == 0:
        sums = torch.zeros(dy.shape[1], dtype=wide, device=dy.device)
        return (
            torch.empty_like(dy) if scaled else None,
            sums if summed else None,
            sums.clone() if shift else None,
        )
    if not summed:
        return (
            scale_columns(dy, scale) if scaled else None,
            None,
            column_sum(dy, wide) if shift else None,
        )
    if x is None:
        raise RuntimeError("the sum over dy * x was asked for without x")
    gamma = scale.to(wide)
    zero = torch.zeros_like(gamma)  # the mean, and the variance: 1 / sqrt(0 + 1) is 1
    scaled_dy, d_scale, d_shift = torch.ops.aten.native_batch_norm_backward(
        dy, x, gamma, zero, zero, None, None, False, 1.0, [scaled, summed, shift]
    )
    return (
        scaled_dy if scaled else None,
        d_scale,
        d_shift if shift else None,
    )


def column_sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_rows dy, in ``dtype``; on a CPU the library's own would make a float32 copy of dy."""
    widens = dtype == torch.float32 and dy.element_size() == 2 and dy.is_cpu
    if not widens or dy.numel() == 0 or not dy.is_contiguous():
        return dy.sum(0, dtype=dtype)
    one = torch.ones(dy.shape[1], dtype=dtype)
    zero = torch.zeros_like(one)
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            some, some, one, zero, zero, None, None, False, 1.0, [False, False, True]
        )[2]
        for some in dy.split(SUMMED_ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
