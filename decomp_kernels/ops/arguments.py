"""What the arguments of decomposed_linear must be, and what is said where they are not.

x [..., K]    weight [N, K]    down [r, K]    up [N, r]    core [r]    in_scale [K]
bias, out_scale [N]    addend [..., N]
"""

import torch
from torch import Tensor

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.ops.autocast import autocast_dtype
from decomp_kernels.ops.tiled_weight import check_quantized
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.reference.dropout import threshold


def check_seed(seed: Tensor | None, x: Tensor) -> None:
    """Raise TypeError or ValueError where a seed of dropout cannot be one."""
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = f"a tensor of {seed.dtype}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"seed must be an int64 tensor such as torch.tensor(5), got {got}")
    if seed.dim() != 0 or seed.device != x.device:
        raise ValueError(
            f"seed must be a scalar on x's device {x.device}, got shape {tuple(seed.shape)} on "
            f"{seed.device}"
        )


def check_arguments(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    addend: Tensor | None,
    activation: str,
    dropout: float,
) -> None:
    """Raise ValueError or TypeError where the arguments of decomposed_linear do not fit."""
    if isinstance(weight, QuantizedWeight):
        check_quantized(weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(
            f"x must end in the weight's K = {K} columns, got shape {tuple(x.shape)}; "
            "weight is [out_features, in_features]"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    quantized = isinstance(weight, QuantizedWeight)
    if x.dtype != weight.dtype and autocast_dtype(x) is None and not quantized:
        raise TypeError(
            f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}; "
            "convert x or run under torch.autocast"
        )
    if (down is None) != (up is None):
        raise ValueError("down and up come together: give both, or neither")
    if core is not None and down is None:
        raise ValueError("core scales the low-rank branch: give down and up with it")
    if down is not None and up is not None:
        r = down.shape[0] if down.dim() == 2 else -1
        _check_term("down", down, (r, K), x)
        _check_term("up", up, (N, r), x)
        if core is not None:
            _check_term("core", core, (r,), x)
    if bias is not None:
        _check_term("bias", bias, (N,), x)
    if in_scale is not None:
        _check_term("in_scale", in_scale, (K,), x)
    if out_scale is not None:
        _check_term("out_scale", out_scale, (N,), x)
    if addend is not None:
        _check_term("addend", addend, (*x.shape[:-1], N), x)
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    one_dtype = down is None or up is None or down.dtype == up.dtype == x.dtype
    if not one_dtype and down is not None and up is not None and autocast_dtype(x) is None:
        if down.dtype != up.dtype:
            raise TypeError(f"down and up must have one dtype, got {down.dtype} and {up.dtype}")
        if down.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
            raise TypeError(f"down and up must be {x.dtype} as x is, or float32, got {down.dtype}")
    if addend is not None and addend.dtype != x.dtype and autocast_dtype(x) is None:
        raise TypeError(f"addend must be {x.dtype} as x is, got {addend.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not 0.0 <= dropout < 1.0 or threshold(dropout) == 65536:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def _check_term(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {_readable(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def _readable(shape: tuple[int | None, ...]) -> str:
    sizes = ["r" if size in (None, -1) else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
