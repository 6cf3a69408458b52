"""Quantised weights to dense ones by look-up and product (maths: reference/dequantize.py).

In blocks that stay in cache, each rounded as it is stored.  The table has both levels of a byte as
one complex number, so that a byte is one look-up of eight bytes: index_select of pairs copies
row by row.
"""

import torch
from torch import Tensor

from decomp_kernels.kernels import gemm
from decomp_kernels.reference.dequantize import LEVELS, block_size


def forward(
    weight: Tensor,
    weight_scale: Tensor,
    weight_format: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    absmax = weight_scale.to(wide).flatten()
    out = torch.empty(rows, cols, dtype=dtype, device=weight.device)
    if weight_format == "int8":
        _by_rows(weight, absmax.div(127)[:, None], out)
    else:
        _by_blocks(weight.flatten(), absmax, out.view(-1), wide)
    return out


def _by_rows(codes: Tensor, step: Tensor, out: Tensor) -> None:
    for some in gemm.row_blocks(codes):
        if out.dtype == step.dtype:
            torch.mul(codes[some], step[some], out=out[some])
        else:
            out[some] = codes[some] * step[some]


def _by_blocks(packed: Tensor, absmax: Tensor, out: Tensor, wide: torch.dtype) -> None:
    levels = torch.tensor(LEVELS, dtype=wide, device=packed.device)
    pairs = torch.complex(levels.repeat_interleave(16), levels.repeat(16))
    size = block_size(out.numel(), absmax.numel())
    assert size is not None  # the public function has seen to that
    whole = out.numel() // size
    for some in gemm.row_blocks(absmax[:whole], cols=size):
        bytes_ = packed[some.start * size // 2 : some.stop * size // 2]
        values = torch.view_as_real(pairs.index_select(0, bytes_.int())).view(-1, size)
        out[some.start * size : some.stop * size] = values.mul_(absmax[some, None]).view(-1)
    if whole < absmax.numel():  # the last block is shorter, and half of its last byte may be unused
        last = torch.view_as_real(pairs.index_select(0, packed[whole * size // 2 :].int()))
        out[whole * size :] = last.view(-1)[: out.numel() - whole * size] * absmax[whole]
