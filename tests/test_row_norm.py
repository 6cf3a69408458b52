"""Row norms of W + s B A: both implementations against float64, and the start of DoRA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decomp_kernels.kernels import gemm
from decomp_kernels.ops.row_norm import bwd, fwd, row_norm, squared_rows, squared_rows_op
from decomp_kernels.testing import assert_as_good_as, relative_error

IMPLS = ("reference", "aten")
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}


def make(dtype, N=37, K=53, r=5):
    base, adapter = DTYPES[dtype]
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=gen, dtype=torch.float64).to(base)
    down = torch.randn(r, K, generator=gen, dtype=torch.float64).to(adapter).requires_grad_()
    up = torch.randn(N, r, generator=gen, dtype=torch.float64).to(adapter).requires_grad_()
    return weight, down, up


def plain(weight, down, up, scale):
    return torch.linalg.vector_norm(weight + scale * (up @ down), dim=1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_formula(dtype, impl):
    weight, down, up = make(dtype)
    d_norm = torch.randn(37)
    exact = weight.double(), *(t.detach().double().requires_grad_() for t in (down, up))
    truth = plain(*exact, 0.7)
    truth = (truth, *torch.autograd.grad(truth, exact[1:], d_norm.double()))
    norm = row_norm(weight, down, up, 0.7, impl=impl)
    assert norm.dtype == torch.promote_types(weight.dtype, torch.float32)
    ours = (norm, *torch.autograd.grad(norm, (down, up), d_norm.to(norm.dtype)))
    eager = plain(weight, down, up, 0.7)
    eager = (eager, *torch.autograd.grad(eager, (down, up), d_norm.to(eager.dtype)))
    for name, *values in zip(("norm", "down", "up"), ours, eager, truth, strict=True):
        if dtype == "fp64":
            assert relative_error(values[0], values[2]) < 1e-13, name
        else:
            assert_as_good_as(*values, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_adapters_on_a_bf16_base_keep_float32_precision(impl):
    weight, down, up = make("bf16-fp32")
    exact = plain(weight.double(), down.double(), up.double(), 0.7)
    assert relative_error(row_norm(weight, down, up, 0.7, impl=impl), exact) < 5e-7


@given(N=st.integers(1, 40), K=st.integers(1, 40), r=st.integers(1, 12))
def test_any_shape(N, K, r):
    weight, down, up = make("fp64", N, K, r)
    assert relative_error(row_norm(weight, down, up, -1.3), plain(weight, down, up, -1.3)) < 1e-9


def test_several_blocks_give_the_same(monkeypatch):
    whole = gemm.row_blocks
    for dtype in ("fp32", "bf16-fp32"):
        weight, down, up = make(dtype)
        once = row_norm(weight, down, up, 0.7)
        once_grad = torch.autograd.grad(once.sum(), (down, up))
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "row_blocks", lambda of: whole(of, 200))
            again = row_norm(weight, down, up, 0.7)
            grads = torch.autograd.grad(again.sum(), (down, up))
        torch.testing.assert_close(again, once)
        torch.testing.assert_close(grads, once_grad)


def test_hand_written_backward_passes_gradcheck():
    weight, down, up = make("fp64", 6, 7, 3)
    for impl in IMPLS:
        assert torch.autograd.gradcheck(
            lambda a, b, impl=impl: row_norm(weight, a, b, 0.7, impl=impl), (down, up)
        )


def test_registration():
    for dtype in ("fp32", "bf16-fp32"):
        weight, down, up = (t.detach() for t in make(dtype))
        for impl in IMPLS:
            norm = fwd(weight, squared_rows(weight), down, up, 0.7, impl)
            torch.library.opcheck(fwd, (weight, squared_rows(weight), down, up, 0.7, impl))
            torch.library.opcheck(bwd, (norm, norm, weight, down, up, 0.7, impl))
        torch.library.opcheck(squared_rows_op, (weight,))


def test_at_the_start_the_norm_is_exactly_the_weights():
    for dtype in ("fp64", "fp32", "bf16", "bf16-fp32"):
        weight, down, up = make(dtype)
        zero, root = torch.zeros_like(up), squared_rows(weight).sqrt()
        assert torch.equal(row_norm(weight, down, zero, 0.7, impl="aten"), root)
        # The library's float32 root is one bit off in places, the native one is correctly rounded.
        auto = row_norm(weight, down, zero, 0.7)
        torch.testing.assert_close(auto, root, rtol=1.2e-7, atol=0)


def test_where_the_update_cancels_the_weight_the_norm_is_zero_and_not_nan():
    up, down = torch.randn(6, 3), torch.randn(3, 8)
    norm = row_norm(-(up @ down), down, up, 1.0)
    assert torch.isfinite(norm).all() and (norm >= 0).all() and norm.max() < 1e-2


def test_bad_shapes_say_what_is_wrong():
    weight, down, up = make("fp32")
    with pytest.raises(ValueError, match=r"down must be \(r, 53\) and up \(37, r\), got"):
        row_norm(weight, down, up[:, :2])
    with pytest.raises(ValueError, match="must be matrices"):
        row_norm(weight[0], down, up)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_lower_the_precision(impl):
    weight, down, up = make("fp32")
    plainly = row_norm(weight, down, up, 0.7, impl=impl)
    plainly = (plainly, *torch.autograd.grad(plainly.sum(), (down, up)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = row_norm(weight, down, up, 0.7, impl=impl)
        inside = (inside, *torch.autograd.grad(inside.sum(), (down, up)))
    assert all(torch.equal(one, other) for one, other in zip(plainly, inside, strict=True))
