"""The low-rank methods, each against its formula written out densely in float64, and against PEFT.

Every parameter is first moved away from the start, where most mistakes are invisible.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decomp_kernels import adapt, methods
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.methods.vera import VeRA
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

M = methods()
P = 0.25  # dropout: a threshold of 16384, so the kept fraction is exactly 0.75


def rotation(D):
    """The Cayley rotation by an explicit inverse."""
    Q, eye = (D - D.T) / 2, torch.eye(len(D), dtype=D.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def low_rank(scale, phi=lambda t: t, core=lambda a: torch.ones_like(a.down[:, 0]).diag()):
    """scale * phi(x A^T) G^T B^T with G = core(a)."""
    return lambda a, x: scale * phi(x @ a.down.T) @ core(a).T @ a.up.T


def diagonal(a):
    return torch.diag(a.core)


def matrix(a):
    return a.core_matrix


def pissa(a, x):
    return x @ (1.5 * (a.up @ a.down - a.up0 @ a.down0)).T


def pissa_relu(a, x):
    return 1.5 * (F.relu(x @ a.down.T) @ a.up.T - F.relu(x @ a.down0.T) @ a.up0.T)


def dash(a, x):
    d = torch.diag(a.core)
    return x @ (1.5 * a.up @ a.down + a.direction_up @ d @ a.direction_down).T


def vera(a, x):
    N, K = len(a.up_scale), x.shape[-1]
    change = torch.diag(a.up_scale) @ a.shared_up[:N] @ torch.diag(a.core) @ a.shared_down[:, :K]
    return x @ change.T


def spectral_additive(a, x):
    U, S, Vt = a.singular_up, torch.diag(a.singular_values), a.singular_down
    return x @ (0.7 * ((U + a.up) @ S @ (Vt + a.down) - U @ S @ Vt)).T


def spectral_rotational(a, x):
    S = a.singular_values
    turned = rotation(a.rotation_up) @ torch.diag(S * a.core) @ rotation(a.rotation_down).T
    return x @ (a.singular_up @ (turned - torch.diag(S)) @ a.singular_down).T


LORA = {"r": 4, "alpha": 6.0, "dropout": P}  # scale 1.5
BRANCHES = {
    "lora": (M["lora"](**LORA), low_rank(1.5)),
    "lora, rslora": (M["lora"](**LORA, use_rslora=True), low_rank(3.0)),
    "lora, relu": (M["lora"](**LORA, activation="relu"), low_rank(1.5, F.relu)),
    "trilora": (M["trilora"](**LORA), low_rank(1.5, core=diagonal)),
    "trilora, rslora": (M["trilora"](**LORA, use_rslora=True), low_rank(3.0, core=diagonal)),
    "trilora, scale": (M["trilora"](**LORA, fixed_scale=0.7), low_rank(0.7, core=diagonal)),
    "trilora, silu": (
        M["trilora"](**LORA, activation="silu"),
        low_rank(1.5, F.silu, diagonal),
    ),
    "adalora": (M["adalora"](**LORA, target_r=2), low_rank(6 / 4.00001, core=diagonal)),
    "adalora, relu": (
        M["adalora"](**LORA, target_r=2, activation="relu"),
        low_rank(6 / 4.00001, F.relu, diagonal),
    ),
    "flora": (M["flora"](**LORA), low_rank(1.5, core=matrix)),
    "flora, relu": (M["flora"](**LORA, activation="relu"), low_rank(1.5, F.relu, matrix)),
    "moslora": (M["moslora"](**LORA), low_rank(1.5, core=matrix)),
    "moslora, gelu": (M["moslora"](**LORA, activation="gelu"), low_rank(1.5, F.gelu, matrix)),
    "pissa": (M["pissa"](**LORA), pissa),
    "pissa, niter": (M["pissa"](**LORA, niter=2), pissa),
    "pissa, relu": (M["pissa"](**LORA, activation="relu"), pissa_relu),
    "milora": (M["milora"](**LORA), pissa),
    "lora_dash": (M["lora_dash"](**LORA, n_directions=3), dash),
    "vera": (M["vera"](r=40, dropout=P), vera),
    "parallel_adapter": (
        M["parallel_adapter"](r=4, scale=0.7, dropout=P),
        low_rank(0.7, F.relu),
    ),
    "parallel_adapter, tanh": (
        M["parallel_adapter"](r=4, dropout=P, activation="tanh"),
        low_rank(1.0, torch.tanh),
    ),
    "spectral_additive": (M["spectral_additive"](r=4, scale=0.7, dropout=P), spectral_additive),
    "spectral_rotational": (M["spectral_rotational"](r=4, dropout=P), spectral_rotational),
}
SERIES = {
    name: M["series_adapter"](r=4, scale=0.7, activation=name)
    for name in ("relu", "silu", "gelu", "tanh")
}
PHI = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}
ALL = [method for method, _ in BRANCHES.values()] + list(SERIES.values())
LINEAR = [name for name, (method, _) in BRANCHES.items() if not method.why_not_mergeable]
SHAPES = [(12, 20), (20, 12), (7, 33)]  # (N, K)


def made(method, N, K, dtype=torch.float64, adapter_dtype=None, bias=True):
    """An adapter at its start, on a random linear whose neighbour in the model is larger."""
    weight = torch.randn(N, K, dtype=dtype)
    base = Base(weight, torch.randn(N, dtype=dtype) if bias else None, adapter_dtype or dtype)
    shared = method.share([(N, K), (N + 5, K + 3)], base.dtype, weight.device)
    adapter = Adapter(method)
    method.create(adapter, base._replace(shared=shared or None))
    return adapter, base


@torch.no_grad()
def disturb(adapter, base):
    """Move every trained parameter by about a third; give LoRA-Dash its directions."""
    for p in adapter.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    if adapter.method.name == "lora_dash":
        adapter.method.select_directions(adapter, base)


def trained(adapter):
    return {name: p for name, p in adapter.named_parameters() if p.requires_grad}


def double_copy(adapter):
    """The adapter's tensors as float64 leaves, by name."""
    copies = {}
    for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
        copies[name] = tensor.detach().clone()
        if tensor.is_floating_point():
            copies[name] = copies[name].double().requires_grad_(tensor.requires_grad)
    return copies


def dropped(x, seed):
    """x under the mask that is drawn from ``seed``, by its definition."""
    rows = x.reshape(-1, x.shape[-1])
    kept = keep_mask(seed, tuple(rows.shape), P).to(x.dtype) / kept_fraction(P)
    return x * kept.view(x.shape)


def next_seed():
    """The dropout seed that the next call will draw, and torch's generator as it was."""
    state = torch.get_rng_state()
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    torch.set_rng_state(state)
    return seed


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", BRANCHES)
def test_a_branch_is_its_dense_formula(case, shape, impl):
    (method, branch), (N, K) = BRANCHES[case], shape
    method = replace(method, impl=impl)
    adapter, base = made(method, N, K)
    disturb(adapter, base)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, N, dtype=torch.float64)

    seed = next_seed()
    y = method.forward(adapter, base, x, training=True)
    ours = torch.autograd.grad(y, [x, *trained(adapter).values()], dy)

    a, x64 = double_copy(adapter), x.detach().clone().requires_grad_()
    plain = F.linear(x64, base.weight, base.bias)
    exact = plain + branch(SimpleNamespace(**a), dropped(x64, seed))
    assert (exact - plain).abs().max() > 1e-2 * plain.abs().max()
    theirs = torch.autograd.grad(exact, [x64, *(a[name] for name in trained(adapter))], dy)

    assert relative_error(y, exact) < 1e-12
    for name, mine, right in zip(["x", *trained(adapter)], ours, theirs, strict=True):
        assert right.abs().max() > 1e-6, f"the gradient of {name} is nothing to compare with"
        assert relative_error(mine, right) < 1e-12, name


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", LINEAR)
def test_the_merged_linear_is_the_dense_formula(case, bias):
    method, branch = BRANCHES[case]
    adapter, base = made(method, 12, 20, bias=bias)
    disturb(adapter, base)
    weight, merged_bias = method.merged(adapter, base)
    change = branch(SimpleNamespace(**double_copy(adapter)), torch.eye(20, dtype=torch.float64)).T
    assert relative_error(weight, base.weight + change) < 1e-12
    assert (merged_bias is None) == (not bias)
    x = torch.randn(5, 20, dtype=torch.float64)
    served = method.forward(adapter, base, x, training=False)
    assert relative_error(F.linear(x, weight, merged_bias), served) < 1e-12


def test_what_cannot_be_merged_says_so():
    for method in ALL:
        curved = getattr(method, "activation", "identity") != "identity"
        assert (method.why_not_mergeable is not None) == curved


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", SERIES)
def test_the_series_adapter_is_its_dense_formula(activation, shape, impl):
    N, K = shape
    method = type(SERIES[activation])(r=4, scale=0.7, activation=activation, impl=impl)
    adapter, base = made(method, N, K)
    disturb(adapter, base)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, N, dtype=torch.float64)
    y = method.forward(adapter, base, x, training=True)
    ours = torch.autograd.grad(y, [x, *trained(adapter).values()], dy)

    a, x64 = double_copy(adapter), x.detach().clone().requires_grad_()
    z = F.linear(x64, base.weight, base.bias)
    hidden = PHI[activation](z @ a["down"].T + a["down_bias"])
    exact = z + 0.7 * hidden @ a["up"].T + a["up_bias"]
    assert (exact - z).abs().max() > 1e-2 * z.abs().max()
    theirs = torch.autograd.grad(exact, [x64, *(a[name] for name in trained(adapter))], dy)
    assert relative_error(y, exact) < 1e-12
    for name, mine, right in zip(["x", *trained(adapter)], ours, theirs, strict=True):
        assert relative_error(mine, right) < 1e-12, name


LOW = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


@pytest.mark.parametrize("dtypes", LOW)
@pytest.mark.parametrize("activation", SERIES)
def test_the_series_adapter_in_low_precision(activation, dtypes):
    """No worse than plain PyTorch in these dtypes, which converts z where the adapter is wider."""
    method, (dtype, adapter_dtype) = replace(SERIES[activation], r=32), LOW[dtypes]
    adapter, base = made(method, 48, 40, dtype, adapter_dtype)
    disturb(adapter, base)
    x = torch.randn(33, 40).to(dtype).requires_grad_()
    dy = torch.randn(33, 48).to(dtype)

    def plain(x, weight, bias, a):
        z = F.linear(x, weight, bias)
        t = z.to(a["down"].dtype) @ a["down"].T + a["down_bias"].to(a["down"].dtype)
        branch = 0.7 * PHI[activation](t) @ a["up"].T + a["up_bias"].to(a["up"].dtype)
        return (z + branch).to(x.dtype)

    def outcome(x, weight, bias, a):
        y = plain(x, weight, bias, a)
        return y, *torch.autograd.grad(y, [x, *(a[name] for name in trained(adapter))], dy.to(y))

    y = method.forward(adapter, base, x, training=True)
    ours = y, *torch.autograd.grad(y, [x, *trained(adapter).values()], dy)
    eager = outcome(x, base.weight, base.bias, trained(adapter))
    x64 = x.detach().double().requires_grad_()
    exact = outcome(x64, base.weight.double(), base.bias.double(), double_copy(adapter))
    for row in zip(ours, eager, exact, ["y", "x", *trained(adapter)], strict=True):
        assert_as_good_as(*row)


def test_the_series_adapter_asks_only_for_the_gradients_it_needs():
    adapter, base = made(SERIES["gelu"], 5, 6)
    disturb(adapter, base)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = adapter.method.forward(adapter, base, x, training=True)
    everything = torch.autograd.grad(y.sum(), list(trained(adapter).values()))
    for name, expected in zip(trained(adapter), everything, strict=True):
        for other, p in adapter.named_parameters():
            p.requires_grad_(other == name)
        y = adapter.method.forward(adapter, base, x, training=True)
        (alone,) = torch.autograd.grad(y.sum(), [getattr(adapter, name)])
        assert torch.equal(alone, expected), name


def test_the_series_adapter_feeds_an_in_place_consumer():
    adapter, base = made(SERIES["relu"], 5, 6)
    disturb(adapter, base)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    y = adapter.method.forward(adapter, base, x, training=True)
    expected = torch.autograd.grad(F.relu(y).sum(), x, retain_graph=True)[0]
    y = adapter.method.forward(adapter, base, x, training=True)
    assert torch.equal(torch.autograd.grad(y.relu_().sum(), x)[0], expected)


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
    c, S = torch.ones(6), torch.linspace(3.0, 1.0, 6)
    small64, S64 = small.double(), S.double()
    turned = rotation(small64[0]) @ torch.diag(S64) @ rotation(small64[1]).T
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


# Sharing


def two_layers():
    return nn.Sequential(nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 30))


def test_vera_has_one_pair_of_projections_for_the_whole_model():
    model = adapt(two_layers(), VeRA(r=6, projection_prng_key=3))
    first, second = (model[i].adapters["default"] for i in (0, 2))
    assert first.shared_down is second.shared_down
    assert first.shared_up is second.shared_up
    assert first.shared_down.shape == (6, 20)
    assert first.shared_up.shape == (30, 6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 + 30 + 2 * 6
    model.to(torch.bfloat16)
    assert first.shared_down is second.shared_down
    assert first.shared_down.dtype == torch.bfloat16


def test_vera_projections_follow_the_key_and_not_the_global_generator():
    def projections(key):
        return VeRA(r=6, projection_prng_key=key).share(
            [(4, 9), (8, 5)], torch.float32, torch.device("cpu")
        )

    before = torch.get_rng_state()
    one, again, other = projections(1), projections(1), projections(2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, shape in (("shared_down", (6, 9)), ("shared_up", (8, 6))):
        assert one[name].shape == shape
        assert not one[name].requires_grad
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


# PEFT as the oracle


def peft_model(config, **options):
    import peft

    model = two_layers()
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    wrapped = peft.get_peft_model(
        model, getattr(peft, config)(target_modules=["0", "2"], **options)
    )
    ours = two_layers()
    ours.load_state_dict(plain)
    return wrapped, ours


def agree(wrapped, ours, pairs):
    """Same values in, same outputs and gradients out, in float64.  pairs: (theirs, ours)."""
    wrapped.double(), ours.double()
    with torch.no_grad():
        for theirs, mine in pairs:
            theirs.add_(0.3 * torch.randn_like(theirs))
            mine.copy_(theirs.view_as(mine))
    x = torch.randn(5, 20, dtype=torch.float64)
    expected, y = wrapped(x), ours(x)
    assert relative_error(y, expected) < 1e-12
    dy = torch.randn_like(y)
    right = torch.autograd.grad(expected, [theirs for theirs, _ in pairs], dy)
    got = torch.autograd.grad(y, [mine for _, mine in pairs], dy)
    for mine, theirs in zip(got, right, strict=True):
        assert theirs.abs().max() > 1e-6
        assert relative_error(mine, theirs.view_as(mine)) < 1e-12


def layers(wrapped, ours):
    for i in (0, 2):
        yield wrapped.base_model.model[i], ours[i].adapters["default"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_is_pefts(use_rslora):
    options = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora}
    wrapped, ours = peft_model("LoraConfig", **options)
    adapt(ours, M["lora"](**options))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        pairs += [
            (theirs.lora_A["default"].weight, mine.down),
            (theirs.lora_B["default"].weight, mine.up),
        ]
    agree(wrapped, ours, pairs)


def test_adalora_is_pefts():
    wrapped, ours = peft_model("AdaLoraConfig", init_r=4, target_r=2, lora_alpha=6, total_step=9)
    adapt(ours, M["adalora"](init_r=4, target_r=2, lora_alpha=6))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        pairs += [
            (theirs.lora_A["default"], mine.down),
            (theirs.lora_B["default"], mine.up),
            (theirs.lora_E["default"], mine.core),
        ]
    agree(wrapped, ours, pairs)


def test_vera_is_pefts_with_the_same_projections():
    options = {"r": 6, "projection_prng_key": 3, "d_initial": 0.2}
    wrapped, ours = peft_model("VeraConfig", **options)
    adapt(ours, VeRA(**options))
    pairs = []
    for theirs, mine in layers(wrapped, ours):
        assert torch.equal(mine.shared_down, theirs.vera_A["default"])
        assert torch.equal(mine.shared_up, theirs.vera_B["default"])
        assert torch.equal(mine.core, theirs.vera_lambda_d["default"])
        pairs += [
            (theirs.vera_lambda_d["default"], mine.core),
            (theirs.vera_lambda_b["default"], mine.up_scale),
        ]
    agree(wrapped, ours, pairs)


def test_pissa_starts_with_pefts_factors_and_computes_its_function():
    wrapped, ours = peft_model("LoraConfig", r=4, lora_alpha=6, init_lora_weights="pissa")
    originals = [ours[i].weight.detach().clone() for i in (0, 2)]
    adapt(ours, M["pissa"](r=4, alpha=6))
    for (theirs, mine), weight in zip(layers(wrapped, ours), originals, strict=True):
        A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
        U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
        root = (S[:4] / 1.5).sqrt()
        sign = (A * mine.down.detach()).sum(1).sign()  # singular vectors are unique up to it
        expected = (root[:, None] * Vt[:4]) * (A.double() * Vt[:4]).sum(1).sign()[:, None]
        assert_as_good_as(sign[:, None] * mine.down, A, expected, "A")
        expected = U[:, :4] * root * (B.double() * U[:, :4]).sum(0).sign()
        assert_as_good_as(mine.up * sign, B, expected, "B")
        with torch.no_grad():  # the same step away from each start
            step = 0.3 * torch.randn_like(A)
            theirs.lora_A["default"].weight.add_(step)
            mine.down.add_(sign[:, None] * step)
    x = torch.randn(5, 20)
    reference = two_layers().double()
    with torch.no_grad():
        for i, (_, mine), weight in zip((0, 2), layers(wrapped, ours), originals, strict=True):
            a = double_copy(mine)
            reference[i].bias.copy_(ours[i].bias)
            change = 1.5 * (a["up"] @ a["down"] - a["up0"] @ a["down0"])
            reference[i].weight.copy_(weight.double() + change)
    assert_as_good_as(ours(x), wrapped(x), reference(x.double()), "y")
    for i, weight in zip((0, 2), originals, strict=True):
        assert torch.equal(ours[i].weight, weight)  # PEFT's is the residual by now


def test_pissas_fast_decomposition_is_no_worse_than_pefts():
    import peft

    spectrum = torch.diag(0.8 ** torch.arange(24.0))
    left, right = (torch.linalg.qr(torch.randn(n, 24)).Q for n in (30, 40))
    weight = left @ spectrum @ right.T
    model = nn.Sequential(nn.Linear(40, 30))
    model[0].weight.data.copy_(weight)
    method = M["pissa"](r=4, alpha=4.0, niter=4)
    adapter = Adapter(method)
    method.create(adapter, Base(weight, None, torch.float32))
    config = peft.LoraConfig(
        target_modules=["0"], r=4, lora_alpha=4, init_lora_weights="pissa_niter_4"
    )
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    U, S, Vt = torch.linalg.svd(weight.double())
    exact = U[:, :4] @ torch.diag(S[:4]) @ Vt[:4]
    assert_as_good_as(adapter.up0 @ adapter.down0, product.detach(), exact, "B0 A0")
