"""What the low-rank methods make from a weight: exact starts, shapes, distributions, refusals."""

import re

import pytest
import torch
from low_rank import ALL, LOW, M, disturb, made, rotation, trained
from torch.nn import functional as F

from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.testing import assert_as_good_as, relative_error


@pytest.mark.parametrize("dtypes", LOW)
@pytest.mark.parametrize("method", ALL, ids=repr)
def test_the_start_is_the_base_layer(method, dtypes):
    """In training too: dropout acts on both terms of a branch that cancels."""
    dtype, adapter_dtype = LOW[dtypes]
    adapter, base = made(method, 12, 20, dtype, adapter_dtype)
    x = torch.randn(6, 20).to(dtype)
    y = method.forward(adapter, base, x, training=True)
    plain = F.linear(x, base.weight, base.bias)
    exact = F.linear(x.double(), base.weight.double(), base.bias.double())
    assert method.identity_at_start
    assert_as_good_as(y, plain, exact, repr(method))
    if method.name not in ("pissa", "milora"):  # theirs cancel to rounding, the others are 0
        assert torch.equal(y, plain)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_a_layer_on_the_meta_device_gets_the_same_tensors_without_values(method):
    real, _ = made(method, 12, 20, torch.bfloat16, torch.float32)
    with torch.device("meta"):
        empty, _ = made(method, 12, 20, torch.bfloat16, torch.float32)

    def described(adapter):
        tensors = [*adapter.named_parameters(), *adapter.named_buffers()]
        return {name: (t.shape, t.dtype, t.requires_grad) for name, t in tensors}

    assert described(empty) == described(real)
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert all(t.is_contiguous() for t in [*real.parameters(), *real.buffers()])
    assert set(real.state_dict()) == set(described(real))  # nothing is left out of the file


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_the_parameters_are_as_many_as_the_method_says(method):
    adapter, _ = made(method, 12, 20)
    known = {"N": 12, "K": 20, "r": method.r, "n": getattr(method, "n_directions", 0)}
    formula = method.trains.replace("^", "**")
    formula = re.sub(r"(\w) (?=[rN(])", r"\1 * ", formula)  # products are written by a space
    assert sum(p.numel() for p in trained(adapter).values()) == eval(formula, known)


def bound(rows):
    return 1 / rows**0.5


def test_initial_distributions():
    """Kaiming with a = sqrt(5) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)); the rest is N(0, 0.02^2)."""
    wide = {"r": 64, "alpha": 64.0}
    uniform = {
        "trilora": {"down": 400, "up": 64},
        "moslora": {"down": 400, "core_matrix": 64},
        "parallel_adapter": {"down": 400},
        "lora_dash": {"down": 400},
        "series_adapter": {"down": 300},
    }
    normal = {"adalora": ("down", "up"), "flora": ("down", "up")}
    for name, tensors in uniform.items():
        cls = M[name]
        adapter, _ = made(cls(**wide) if hasattr(cls, "alpha") else cls(r=64), 300, 400)
        for tensor, fan_in in tensors.items():
            values = getattr(adapter, tensor)
            assert bound(fan_in) * 0.99 < values.abs().max() < bound(fan_in), (name, tensor)
            assert values.std().item() == pytest.approx(bound(fan_in) / 3**0.5, rel=0.05)
        for tensor, p in trained(adapter).items():
            assert tensor in tensors or not p.any(), (name, tensor)
    for name, tensors in normal.items():
        adapter, _ = made(M[name](**wide), 300, 400)
        for tensor in tensors:
            assert getattr(adapter, tensor).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["pissa", "milora", "spectral_additive", "spectral_rotational"])
def test_a_rank_that_has_no_singular_vectors_is_refused(name):
    method = M[name](r=13)
    with pytest.raises(ValueError, match=r"at most min\(out_features, in_features\) = 12 for q"):
        method.check_shape(12, 20, "q")
    method.check_shape(13, 20, "q")


@pytest.mark.parametrize("options", [{}, {"niter": 2}], ids=["full", "niter"])
@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_a_weight_that_is_not_finite_is_refused(name, options):
    if name == "milora" and options:
        options = {"r": 2}
    weight = torch.randn(12, 20)
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="the weight of q must be finite"):
        method = M[name](**options)
        method.create(Adapter(method), Base(weight, None, torch.float32, "q"))


def test_options_that_cannot_be_right_are_refused():
    for name, options, says in [
        ("pissa", {"alpha": 0.0}, "alpha must be positive"),
        ("pissa", {"niter": -1}, "niter must be at least 0"),
        ("parallel_adapter", {"activation": "identity"}, "use LoRA for a linear branch"),
        ("series_adapter", {"activation": "identity"}, "use LoRA for a linear branch"),
        ("series_adapter", {"activation": "elu"}, "activation must be one of"),
        ("vera", {"r": 0}, "r must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            M[name](**options)


def test_pissa_takes_the_largest_and_milora_the_smallest_triplets():
    for name, part in (("pissa", slice(0, 4)), ("milora", slice(8, 12))):
        adapter, base = made(M[name](r=4, alpha=6.0), 12, 20)
        U, S, Vt = torch.linalg.svd(base.weight, full_matrices=False)
        expected = U[:, part] @ torch.diag(S[part]) @ Vt[part]
        assert relative_error(1.5 * adapter.up0 @ adapter.down0, expected) < 1e-12
        gram = adapter.down0 @ adapter.down0.T  # the two factors share the values evenly
        assert relative_error(gram, torch.diag(S[part] / 1.5)) < 1e-12
        assert relative_error(adapter.up0.T @ adapter.up0, gram) < 1e-12
        assert torch.equal(adapter.up, adapter.up0)
        assert torch.equal(adapter.down, adapter.down0)
        assert adapter.up.data_ptr() != adapter.up0.data_ptr()


def test_the_spectral_directions_are_the_top_singular_ones():
    for name in ("spectral_additive", "spectral_rotational"):
        adapter, base = made(M[name](r=4), 12, 20)
        U, S, Vt = torch.linalg.svd(base.weight, full_matrices=False)
        top = adapter.singular_up @ torch.diag(adapter.singular_values) @ adapter.singular_down
        assert relative_error(top, U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]) < 1e-12
        eye = torch.eye(4, dtype=torch.float64)
        assert relative_error(adapter.singular_up.T @ adapter.singular_up, eye) < 1e-12
        assert relative_error(adapter.singular_down @ adapter.singular_down.T, eye) < 1e-12


def test_the_rotational_core_keeps_the_digits_of_small_rotations():
    from decomp_kernels.methods.spectral_rotational import core_matrix

    small = 1e-5 * torch.randn(2, 6, 6)
    c, S = 1 + 1e-5 * torch.randn(6), torch.linspace(3.0, 1.0, 6)
    small64, c64, S64 = small.double(), c.double(), S.double()
    turned = rotation(small64[0]) @ torch.diag(S64 * c64) @ rotation(small64[1]).T
    # float32 keeps 2^-24 of a number near S, and G is about 1e-5 S: the difference itself would
    # have 2^-24 / 1e-5, six thousandths, of G left to chance.
    error = relative_error(core_matrix(*small, c, S), turned - torch.diag(S64))
    assert error < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["vera", "spectral_rotational"])
def test_frozen_projections_keep_no_input_for_backward(name):
    adapter, base = made(M[name](r=4), 12, 20)
    disturb(adapter, base)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter.method.forward(adapter, base, x, training=True)
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert x.untyped_storage().data_ptr() not in storages
    adapter, base = made(M["lora"](r=4), 12, 20)  # the control: a trained down needs x
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter.method.forward(adapter, base, x, training=True)
    assert x.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in saved}
