"""The tolerance policy.  A fast path may be twice as wrong as PyTorch in the same dtypes, no more."""

import torch
from torch import Tensor


def assert_as_good_as(actual: Tensor, eager: Tensor, exact: Tensor, name: str) -> None:
    """``exact`` is the float64 result, ``eager`` plain PyTorch in the dtypes under test."""
    exact = exact.detach().double()
    actual = actual.detach()
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * (eager.detach().double() - exact).abs().max() + 2 * rounding
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 where both are zero."""
    exact = exact.detach().double()
    difference = (actual.detach().double() - exact).norm().item()
    return difference / exact.norm().item() if difference else 0.0
