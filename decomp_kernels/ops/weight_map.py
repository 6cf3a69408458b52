"""What the weight maps' operators share: the check against W [N, K]."""

from collections.abc import Mapping

import torch
from torch import Tensor

from decomp_kernels.factors import WeightMap
from decomp_kernels.quantized_weight import QuantizedWeight


def check_tensors(
    m: WeightMap,
    weight: Tensor | QuantizedWeight,
    expected: Mapping[str, tuple[int | str, ...]],
    indices: str = "",
) -> dict[str, int]:
    """Raise ValueError or TypeError where a tensor of ``m`` does not fit; returns the letters.

    expected: the shape of each tensor; a letter stands for any size, the same one everywhere.
    indices: names of the tensors that hold int64 positions, separated by spaces.
    """
    letters: dict[str, int] = {}
    kind = type(m).__name__
    allowed = {weight.dtype, torch.promote_types(weight.dtype, torch.float32)}
    if isinstance(weight, QuantizedWeight):  # multiplied in x's dtype, whatever it was made from
        allowed |= {torch.bfloat16, torch.float16}
    for name, tensor in m.named_tensors().items():
        wanted = expected[name]
        what = f"{kind}'s {name} must"
        sizes = tuple(tensor.shape)
        if len(sizes) == len(wanted):
            for size, letter in zip(sizes, wanted, strict=True):
                if isinstance(letter, str):
                    letters.setdefault(letter, size)
        if sizes != tuple(letters.get(size, size) for size in wanted):  # type: ignore[arg-type]
            shape = ", ".join(
                f"{want} = {letters[want]}" if want in letters else str(want) for want in wanted
            )
            raise ValueError(
                f"{what} have shape [{shape}] for a weight of shape {tuple(weight.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"{what} be on the weight's device {weight.device}, got {tensor.device}"
            )
        if name in indices.split():
            if tensor.dtype != torch.int64:
                raise TypeError(f"{what} be int64, got {tensor.dtype}")
        elif tensor.dtype not in allowed:
            raise TypeError(
                f"{what} be {weight.dtype} as the weight is, or float32, got {tensor.dtype}"
            )
    return letters
