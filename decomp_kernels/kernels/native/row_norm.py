"""Row norms of W + scale * B A by the native library (maths: reference/row_norm.py)."""

from torch import Tensor

from decomp_kernels import native_library


def squared_rows(weight: Tensor) -> Tensor:
    """||W_j||^2 [N], float32."""
    return native_library.ops().squared_rows(weight.contiguous())


def forward(weight: Tensor, weight_sq: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """n [N], float32."""
    return native_library.ops().row_norm_fwd(
        weight.contiguous(), weight_sq, down.contiguous(), up.contiguous(), scale
    )


def backward(
    d_norm: Tensor, norm: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(d_down, d_up), float32: one read of W."""
    return native_library.ops().row_norm_bwd(
        d_norm.contiguous(),
        norm,
        weight.contiguous(),
        down.contiguous(),
        up.contiguous(),
        scale,
    )
