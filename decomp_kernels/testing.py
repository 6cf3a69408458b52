"""The tolerance policy: a fast path may be twice as wrong as PyTorch in the same dtypes."""

import torch
from torch import Tensor


def assert_as_good_as(
    actual: Tensor, eager: Tensor, exact: Tensor, name: str, dtype: torch.dtype | None = None
) -> None:
    """``exact`` is the float64 result, ``eager`` plain PyTorch in the dtypes under test.

    Errors are 2-norms over the tensor: the largest of a few elements is a matter of luck.
    dtype: the coarsest dtype that intermediate results have, where it is not the result's own:
    a float32 sum of a few bf16 products is as uncertain as bf16.
    """
    exact = exact.detach().double()
    actual = actual.detach()
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(dtype or actual.dtype).eps * exact.norm()
    budget = 2 * (eager.detach().double() - exact).norm() + 2 * rounding
    error = (actual.double() - exact).norm()
    assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 where both are zero."""
    exact = exact.detach().double()
    difference = (actual.detach().double() - exact).norm().item()
    return difference / exact.norm().item() if difference else 0.0
