"""Published code of these methods has defects that change results; ours has none of them.

Each test names the defect.  They were found in the authors' repository of arXiv:2407.05417, in
other authors' code it builds on, and in PEFT.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import decomp_kernels as dk
from decomp_kernels.constraints import mpc_loss
from decomp_kernels.kernels.aten import decomposed_linear as aten
from decomp_kernels.methods.base import METHODS
from decomp_kernels.methods.lora_dash import select_directions
from decomp_kernels.reference.decomposed_linear import Gradients
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

N, K, M = 20, 28, 6
every_method = pytest.mark.parametrize("name", sorted(METHODS))
FROM_SINGULAR_VECTORS = (
    "lora_dash", "milora", "pissa", "sam_parser", "spectral_additive", "spectral_rotational",
    "svdiff",
)  # fmt: skip
from_singular_vectors = pytest.mark.parametrize("name", FROM_SINGULAR_VECTORS)


def layer_with(name, dtype=torch.float64, shape=(K, N)):
    return dk.DecomposedLinear(nn.Linear(*shape, dtype=dtype), METHODS[name].small())


def adapter_of(layer):
    return layer.adapters["default"]


def disturb(layer):
    """Leave the start; LoRA-Dash selects its directions, which is what its warm-up is for."""
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    if adapter_of(layer).method.name == "lora_dash":
        select_directions(layer)
    return layer


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


# Parameters that were made, or made trainable, in the first forward


@every_method
def test_an_optimizer_built_before_the_first_forward_trains_everything(name):
    """SAM-PARSER's values, DoRA's magnitude, Spectral's U side and MiLoRA's A and B were made in
    forward, after the optimizer: they never moved.  From the start itself, in three steps.
    """
    layer = layer_with(name).train()
    before = trained(layer)
    values = {n: p.detach().clone() for n, p in before.items()}
    optimizer = torch.optim.SGD(before.values(), lr=0.05)
    x, target = torch.randn(M, K, dtype=torch.float64), torch.randn(M, N, dtype=torch.float64)
    for step in range(3):
        if name == "lora_dash" and step == 2:
            select_directions(layer)
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    after = trained(layer)
    assert after.keys() == before.keys(), "forward changed what is trained"
    for n, p in after.items():
        assert p is before[n], f"{n} was made anew"
        assert not torch.equal(p, values[n]), f"{n} did not move"


# A decomposition of a weight that was not loaded yet


@from_singular_vectors
def test_the_start_is_the_loaded_weight_whenever_it_is_loaded(name):
    """PiSSA decomposed the random weight of construction: the loaded weight then replaced the
    residual, and the layer started 0.85 away from the model.
    """
    checkpoint = nn.Linear(K, N)
    x = torch.randn(M, K)
    exact = F.linear(x.double(), checkpoint.weight.double(), checkpoint.bias.double())
    loaded_first, loaded_last = nn.Linear(K, N), layer_with(name, torch.float32)
    loaded_first.load_state_dict(checkpoint.state_dict())
    loaded_first = dk.DecomposedLinear(loaded_first, METHODS[name].small())
    loaded_last.load_state_dict(checkpoint.state_dict(), strict=False)
    for layer in (loaded_first, loaded_last):
        assert_as_good_as(layer(x), checkpoint(x), exact, name)


@from_singular_vectors
def test_singular_vectors_are_those_of_the_loaded_weight(name):
    """The way of a large model: adapted without values, then loaded, then initialised."""
    checkpoint = nn.Linear(K, N)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N))
    dk.adapt(model, METHODS[name].small(), ["0"])
    weights = {f"0.{key}": value for key, value in checkpoint.state_dict().items()}
    model.load_state_dict(weights, strict=False, assign=True)
    dk.initialize(model)
    direct = dk.DecomposedLinear(checkpoint, METHODS[name].small())
    for key, tensor in adapter_of(direct).named_buffers():
        assert torch.equal(adapter_of(model[0]).get_buffer(key), tensor), key


def test_pissa_rounds_no_weight():
    """The residual W - s B0 A0 in bf16 rounds every weight anew, and is what a disabled adapter
    would then show.
    """
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    weight = linear.weight.detach().clone()
    x = torch.randn(M, K).bfloat16()
    for name in ("pissa", "milora"):
        model = dk.adapt(nn.Sequential(linear), METHODS[name].small(), ["0"])
        assert torch.equal(model[0].weight, weight)
        with dk.disable(model):
            assert torch.equal(model(x), F.linear(x, weight, linear.bias))
        dk.remove(model)


# Singular vectors as plain attributes: left behind by .to(), and left out of the file


@from_singular_vectors
def test_singular_vectors_move_and_are_saved(name):
    layer = disturb(layer_with(name, torch.float32))
    adapter = adapter_of(layer)
    strays = [n for n, value in vars(adapter).items() if isinstance(value, torch.Tensor)]
    assert not strays
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    assert adapter.state_dict().keys() == tensors.keys()
    assert any(n for n, _ in adapter.named_buffers())
    x = torch.randn(M, K)
    expected = layer(x)
    fresh = layer_with(name, torch.float32)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    layer.to("meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


# Scales


@pytest.mark.parametrize("name", ["trilora", "parallel_adapter", "flora", "lora", "adalora"])
def test_the_scale_is_applied(name):
    """TriLoRA and the parallel adapter computed alpha / r and did not use it."""
    cls = METHODS[name]
    key = "scale" if name == "parallel_adapter" else "alpha"
    one, two = cls(r=4, **{key: 3.0}), cls(r=4, **{key: 6.0})
    layer = disturb(dk.DecomposedLinear(nn.Linear(K, N, dtype=torch.float64), one))
    x = torch.randn(M, K, dtype=torch.float64)
    plain = F.linear(x, layer.weight, layer.bias)
    small = layer(x) - plain
    adapter_of(layer).method = two
    assert small.abs().max() > 1e-2
    assert relative_error(layer(x) - plain, 2 * small) < 1e-12


def test_dropout_is_on_the_input_of_the_parallel_adapter_as_of_every_branch():
    """It was on the bottleneck there, and on x elsewhere."""
    method = METHODS["parallel_adapter"](r=4, dropout=0.5)
    layer = disturb(dk.DecomposedLinear(nn.Linear(K, N, dtype=torch.float64), method)).train()
    adapter = adapter_of(layer)
    x = torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    torch.manual_seed(7)
    y = layer(x)
    dropped = x * keep_mask(seed, (M, K), 0.5).double() / kept_fraction(0.5)
    expected = F.linear(x, layer.weight, layer.bias)
    expected = expected + F.relu(dropped @ adapter.down.T) @ adapter.up.T
    assert relative_error(y, expected) < 1e-12


# Weights stored as [in, out]


@pytest.mark.parametrize("size", [(K, K), (K, N)], ids=["square", "wide"])
@pytest.mark.parametrize("name", ["ssl", "ssb", "ia3"])
def test_scales_are_on_their_own_side_of_a_transposed_weight(name, size):
    """SSL, SSB and IA3 scaled the wrong axis of a [in, out] weight: an error, or for a square one
    silently another function.
    """
    from transformers.pytorch_utils import Conv1D

    inputs, outputs = size
    model = nn.Sequential(Conv1D(outputs, inputs)).double()
    weight, bias = model[0].weight.detach().clone(), torch.randn(outputs, dtype=torch.float64)
    model[0].bias.data.copy_(bias)
    dk.adapt(model, METHODS[name](), ["0"])
    adapter = adapter_of(disturb(model[0]))
    x = torch.randn(M, inputs, dtype=torch.float64)
    s_in = getattr(adapter, "in_scale", torch.ones(inputs, dtype=torch.float64))
    s_out = getattr(adapter, "out_scale", torch.ones(outputs, dtype=torch.float64))
    assert relative_error(model(x), ((x * s_in) @ weight) * s_out + bias) < 1e-12


def test_the_bias_is_scaled_only_where_it_is_asked_for():
    """PEFT's IA3 scales the bias too; the method's own formula does not."""
    for scale_bias in (False, True):
        linear = nn.Linear(K, N, dtype=torch.float64)
        layer = disturb(dk.DecomposedLinear(linear, METHODS["ia3"](scale_bias=scale_bias)))
        l = adapter_of(layer).out_scale
        expected = l * layer.bias if scale_bias else layer.bias
        assert relative_error(layer(torch.zeros(1, K, dtype=torch.float64))[0], expected) < 1e-15


def test_the_gradient_of_a_scale_costs_no_product_of_matrices():
    """Scaling the weight made autograd find its whole gradient, a second 2 M N K product."""
    x, dy, z = torch.randn(M, K), torch.randn(M, N), torch.randn(M, N)
    weight, s_in, s_out = torch.randn(N, K), torch.randn(K), torch.randn(N)
    asked = {"x": True, "in_scale": True, "out_scale": True}
    needs = Gradients(*(asked.get(name, False) for name in Gradients._fields))
    with FlopCounterMode(display=False) as counter:
        aten.backward(
            dy, x, weight, None, None, None, None, s_in, s_out, None, z, None, 1.0, 0.0,
            "identity", needs,
        )  # fmt: skip
    assert counter.get_total_flops() == 2 * M * N * K  # dx alone
    needs = Gradients(*(name == "out_scale" for name in Gradients._fields))
    with FlopCounterMode(display=False) as counter:
        aten.backward(
            dy, None, weight, None, None, None, None, None, s_out, None, z, None, 1.0, 0.0,
            "identity", needs,
        )  # fmt: skip
    assert counter.get_total_flops() == 0


# LoRA-Dash's phase


def test_lora_dash_resumes_with_its_directions():
    """A counter of forward calls, not saved, switched the directions on, and chose new ones over
    the loaded ones 100 calls after a resume.
    """
    layer = disturb(layer_with("lora_dash")).train()
    with torch.no_grad():
        adapter_of(layer).core.normal_()
    x = torch.randn(M, K, dtype=torch.float64)
    expected = layer(x)
    resumed = layer_with("lora_dash").train()
    resumed.load_state_dict(layer.state_dict())
    optimizer = torch.optim.SGD(trained(resumed).values(), lr=0.0)
    for _ in range(120):
        y = resumed(x)
        y.sum().backward()
        optimizer.step()
        assert torch.equal(y, expected)


# The paper's constraints


@pytest.mark.parametrize("kind", ["o", "d"])
@pytest.mark.parametrize("name", ["lora", "trilora", "adalora", "flora", "moslora", "dora"])
def test_the_constraint_reaches_every_method_that_has_both_factors(name, kind):
    """The shipped trainer had it commented out for LoRA and added 0; AdaLoRA's was not squared and
    was averaged over the matrices.
    """
    layer = disturb(layer_with(name))
    A, B = adapter_of(layer).down, adapter_of(layer).up
    eye = torch.eye(4, dtype=torch.float64)
    gram = B.T @ B
    pattern = eye if kind == "o" else torch.diag(torch.diag(gram.detach()))
    terms = A @ A.T - eye, gram - pattern
    loss = mpc_loss(layer, kind, 0.3)
    expected = 0.3 * sum((term**2).sum() for term in terms)
    assert relative_error(loss, expected) < 1e-12
    for ours, right in zip(
        torch.autograd.grad(loss, [A, B]), torch.autograd.grad(expected, [A, B]), strict=True
    ):
        assert right.abs().max() > 1e-3
        assert relative_error(ours, right) < 1e-12
    if kind == "o":  # AdaLoRA's code, where it is asked for
        theirs = mpc_loss(layer, "o", 0.3, squared=False, reduction="mean_over_matrices")
        norms = 0.3 / 2 * sum(term.norm() for term in (A @ A.T - eye, gram - eye))
        assert relative_error(theirs, norms) < 1e-12


# Dense products that the formula does not ask for


class Shapes(TorchDispatchMode):
    """The shape of every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        views = "t", "transpose", "permute", "detach", "alias"
        if func.overloadpacket.__name__ not in views:  # a view of the frozen weight is no product
            self.seen |= {tuple(t.shape) for t in results if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize(
    "name",
    ["lora", "trilora", "adalora", "flora", "moslora", "pissa", "milora", "lora_dash", "vera",
     "spectral_additive", "spectral_rotational", "dora", "hra", "parallel_adapter"],
)  # fmt: skip
def test_no_dense_update_is_formed(name):
    """x (A B) for (x A) B, diag(e) as a matrix, DoRA through eye(K), HRA as a K x K product."""
    layer = disturb(layer_with(name)).train()
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    with Shapes() as shapes:
        layer(x).sum().backward()
    dense = {(N, K), (K, N), (K, K), (N, N)}
    assert (M, N) in shapes.seen
    assert not shapes.seen & dense


def test_the_dense_forms_would_be_seen():
    """The control of the test above."""
    x, A, B = torch.randn(M, K), torch.randn(4, K), torch.randn(N, 4)
    with Shapes() as shapes:
        x @ (A.T @ B.T)
    assert (K, N) in shapes.seen


@pytest.mark.parametrize("name", ["sam_parser", "svdiff"])
def test_no_diagonal_is_made_a_matrix(name):
    layer = disturb(layer_with(name)).train()
    with Shapes() as shapes:
        layer(torch.randn(M, K, dtype=torch.float64)).sum().backward()
    assert (M, N) in shapes.seen
    assert not shapes.seen & {(N, N), (K, K)}  # min(N, K) = N singular values


# PEFT's butterflies


def test_every_butterfly_factor_is_used():
    """PEFT without its CUDA extension silently uses one factor, whatever was asked for."""
    size = 16
    method = METHODS["boft"](block_size=4, n_butterfly_factor=2)
    linear = nn.Linear(size, size, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(torch.eye(size))
    layer = dk.DecomposedLinear(linear, method)
    with torch.no_grad():
        adapter_of(layer).rotation.normal_()
    R = layer(torch.eye(size, dtype=torch.float64))
    eye = torch.eye(size, dtype=torch.float64)
    assert relative_error(R @ R.T, eye) < 1e-12
    blocks = torch.block_diag(*[torch.ones(4, 4, dtype=torch.float64)] * 4)
    assert (R * (1 - blocks)).abs().max() > 0.1, "columns of different blocks are never mixed"
    F.mse_loss(layer(torch.randn(M, size).double()), torch.randn(M, size).double()).backward()
    gradient = adapter_of(layer).rotation.grad
    assert gradient.shape[0] == 2
    assert (gradient.abs().amax((1, 2, 3)) > 1e-6).all()
