"""Dense weights to codes and scales, the definition (formats: reference/dequantize.py).

    absmax = max |w| over a block or a row
    "nf4"   the code of the level nearest to w * (1 / absmax); half way between two, of the lower
    "int8"  round(w * (127 / absmax)), halves to even

Where absmax is 0, so is every w, and so is every dequantised value.  In float32, in this order of
operations, the codes are those of bitsandbytes.
"""

import torch
from torch import Tensor

from decomp_kernels.reference.dequantize import LEVELS


def forward(weight: Tensor, weight_format: str, block: int) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of weight [N, K]: uint8 [N, K / 2] and one absmax for each ``block`` of
    elements of "nf4", int8 [N, K] and [N] of "int8".
    """
    weight = weight.float()
    if weight_format == "int8":
        absmax = weight.abs().amax(1)
        return torch.round(weight * (127 / _divisor(absmax))[:, None]).to(torch.int8), absmax
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / _divisor(absmax))[:, None]).clamp(-1, 1).flatten()[: flat.numel()]
    levels = torch.tensor(LEVELS, device=weight.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).view(weight.shape[0], -1), absmax


def _divisor(absmax: Tensor) -> Tensor:
    return torch.where(absmax > 0, absmax, 1)
