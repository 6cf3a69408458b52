"""Column sums by one library pass, where a float32 copy of the whole tensor is not made."""

import pytest
import torch

from decomp_kernels import native_library
from decomp_kernels.kernels.columns import SUMMED_ROWS, column_sum
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.testing import relative_error

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, SUMMED_ROWS, SUMMED_ROWS + 1, 3 * SUMMED_ROWS + 5])
def test_sums_are_those_of_float64(rows, dtype):
    dy = torch.randn(rows, 5).to(dtype)
    found = column_sum(dy, torch.float32)
    assert found.dtype == torch.float32
    assert relative_error(found, dy.double().sum(0)) < 1e-5


def test_many_rows_of_one_sign_lose_no_digits():
    """One after another, 200,000 rows of 0.1 are off by 3e-3."""
    dy = torch.full((200_000, 3), 0.1).bfloat16()
    assert relative_error(column_sum(dy, torch.float32), dy.double().sum(0)) < 1e-5
    node = native_library.autograd_node()
    bias = torch.zeros(3, requires_grad=True)
    y = decomposed_linear(dy[:, :2], torch.zeros(3, 2).bfloat16(), bias, impl="aten")
    assert node is None or type(y.grad_fn).__name__ != "_DecomposedLinearBackward"
    y.backward(dy)
    assert relative_error(bias.grad, dy.double().sum(0)) < 1e-5


def test_tensors_in_another_order_are_summed_exactly_too():
    for dy in (torch.randn(9, 1).bfloat16().expand(9, 33), torch.randn(33, 70).bfloat16().T):
        assert relative_error(column_sum(dy, torch.float32), dy.double().sum(0)) < 1e-6
