"""What is kept for backward, to the byte; no weight-sized temporary; in-place consumers of y."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import decomp_kernels as dk
from decomp_kernels import native_library
from decomp_kernels.kernels.aten import decomposed_linear as aten
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.testing import relative_error

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # four lines a profile on stderr otherwise
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of switching oneDNN off

LEADING, K, N, r = (2, 3), 11, 13, 5
M = 6
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# What each method keeps: x [M, K], t [M, r] in the adapter's dtype, z [M, N], and small float32
# vectors.  DoRA's are magnitude / norm and the norm; VeRA's is the matrix diag(l_b) B0 [N, r].
KEEPS = {
    "lora": (dk.LoRA(r=r), ("x", "t"), 0),
    "lora-relu": (dk.LoRA(r=r, activation="relu"), ("x", "t"), 0),
    "dora": (dk.DoRA(r=r), ("x", "t", "z"), 2 * N),
    "dora-cached": (dk.DoRA(r=r, cache_norm=True), ("x", "t", "z"), 2 * N),
    "trilora": (dk.TriLoRA(r=r), ("x", "t"), 0),
    "vera": (dk.VeRA(r=r), ("t",), N * r),
    "ssl": (dk.SSL(), ("x",), 0),
    "ia3": (dk.IA3(), ("z",), 0),
    "ssb": (dk.SSB(), ("x", "z"), 0),
    "bitfit": (dk.BitFit(), (), 0),
}
every_method = pytest.mark.parametrize("name", KEEPS)


def size(parts, vectors, base=FP32, adapter=FP32):
    elements = {"x": M * K * base.itemsize, "t": M * r * adapter.itemsize}
    elements["z"] = M * N * base.itemsize
    return sum(elements[part] for part in parts) + 4 * vectors


def make(method, base=FP32, adapter=None, bias=True, shape=(K, N)):
    """A layer away from its start."""
    layer = dk.DecomposedLinear(nn.Linear(*shape, bias=bias, dtype=base), method, dtype=adapter)
    with torch.no_grad():
        for tensor in layer.adapters.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return layer


def kept(call, known):
    """(bytes of the storages kept for backward that are no one of ``known``'s, their tensors)."""
    packed, known = [], {tensor.untyped_storage().data_ptr() for tensor in known}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        call()
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in packed}
    extra = [tensor for pointer, tensor in storages.items() if pointer not in known]
    return sum(tensor.untyped_storage().nbytes() for tensor in extra), extra


def kept_by(layer, x):
    return kept(lambda: layer(x), [*layer.parameters(), *layer.buffers()])


@every_method
@pytest.mark.parametrize("x_trained", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32)],
    ids=["fp32", "bf16", "bf16-fp32", "fp16-fp32"],
)
def test_keeps_exactly(name, base, adapter, x_trained):
    """float32 adapters on a bf16 base: x stays bf16, only the rank-r activation is float32."""
    method, parts, vectors = KEEPS[name]
    layer = make(method, base, adapter)
    x = torch.randn(*LEADING, K, dtype=base, requires_grad=x_trained)
    expected = size(parts, vectors, base, adapter)
    if name == "vera":  # its scaled B0 has the adapter's dtype
        expected += vectors * (adapter.itemsize - 4)
    total, tensors = kept_by(layer, x)
    assert total == expected
    assert any(t.data_ptr() == x.data_ptr() for t in tensors) == ("x" in parts)


@every_method
def test_keeps_nothing_that_no_gradient_needs(name):
    method, _, vectors = KEEPS[name]
    layer = make(method).requires_grad_(False)
    x = torch.randn(*LEADING, K, requires_grad=True)
    total, _ = kept_by(layer, x)
    # Through the frozen layer to x goes g W + u A: t and x are not in it, but for relu'(t).  The
    # lowered vectors are: magnitude / norm, and VeRA's scaled B0.
    allowed = {"lora-relu": size(("t",), 0), "dora": 4 * N, "dora-cached": 4 * N}
    assert total == allowed.get(name, 4 * vectors)
    with torch.no_grad():
        assert kept_by(layer, x)[0] == 0


@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
@pytest.mark.parametrize("base", [FP32, BF16], ids=["fp32", "bf16"])
def test_dropout_keeps_its_seed_alone(name, base):
    method, parts, vectors = KEEPS[name]
    method = type(method)(r=r, dropout=0.3)
    layer = make(method, base)
    x = torch.randn(*LEADING, K, dtype=base, requires_grad=True)
    expected = size(parts, vectors, base)
    assert kept_by(layer.eval(), x)[0] == expected
    # VeRA's x is not kept without dropout, and nor is it with it: A0 is frozen.
    assert kept_by(layer.train(), x)[0] == expected + 8


@every_method
def test_autocast_keeps_no_cast_copy_of_x(name):
    method, parts, vectors = KEEPS[name]
    layer = make(method)
    x = torch.randn(*LEADING, K, requires_grad=True)

    def call():
        with torch.autocast("cpu", BF16):
            layer(x)

    total, tensors = kept(call, [*layer.parameters(), *layer.buffers()])
    float32 = [part for part in parts if part == "x"]
    bf16 = [part for part in parts if part != "x"]
    assert total == size(float32, vectors) + size(bf16, 0, BF16, BF16)
    assert any(t.data_ptr() == x.data_ptr() for t in tensors) == ("x" in parts)


@every_method
def test_a_view_of_x_is_kept_as_the_view(name):
    method, parts, vectors = KEEPS[name]
    layer = make(method)
    x = torch.randn(K, M).T.requires_grad_()  # column-major: the GEMMs take a copy of it
    total, tensors = kept_by(layer, x)
    assert total == size(parts, vectors)
    assert any(t.data_ptr() == x.data_ptr() for t in tensors) == ("x" in parts)


def test_a_copy_that_is_kept_is_seen():
    """The control of the tests above: a layer that keeps a float32 copy of a bf16 x."""
    weight = nn.Parameter(torch.randn(N, K))
    x = torch.randn(*LEADING, K, dtype=BF16, requires_grad=True)
    total, _ = kept(lambda: F.linear(x.float(), weight), [weight])
    assert total == M * K * 4


# --- no N x K tensor ------------------------------------------------------------------------------

SIDE, TOKENS = 1536, 8  # N = K: one byte an element is more than any block buffer of the kernels

UNMAPPED = {
    "lora": dk.LoRA(r=4),
    "lora-dropout": dk.LoRA(r=4, dropout=0.1),
    "dora": dk.DoRA(r=4),
    "dora-norm-grad": dk.DoRA(r=4, norm_grad=True),
    "dora-peft-dropout": dk.DoRA(r=4, dropout=0.1, dropout_mode="peft"),
    "ssl": dk.SSL(),
    "ssb": dk.SSB(),
    "ia3": dk.IA3(),
}
big_dtypes = pytest.mark.parametrize(
    ("base", "adapter"),
    [(FP32, FP32), (BF16, BF16), (BF16, FP32)],
    ids=["fp32", "bf16", "bf16-fp32"],
)


def allocations_of(call, least=SIDE * SIDE):
    """Sizes of the allocations, inside operators and library calls too, of ``least`` bytes or more.

    Without oneDNN: what a library packs for its own GEMM is not what is tested.
    """
    with (
        torch.backends.mkldnn.flags(enabled=False),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run,
    ):
        call()
    sizes = [e.nbytes() for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert any(bytes_ > 0 for bytes_ in sizes), "the profiler saw no allocation at all"
    return [bytes_ for bytes_ in sizes if bytes_ >= least]


def step(layer, base):
    x = torch.randn(TOKENS, SIDE, dtype=base, requires_grad=True)
    return lambda: layer(x).sum().backward()


@big_dtypes
@pytest.mark.parametrize("name", UNMAPPED)
def test_no_weight_sized_tensor_is_made(name, base, adapter):
    layer = make(UNMAPPED[name], base, adapter, shape=(SIDE, SIDE))
    assert allocations_of(step(layer, base)) == []
    layer.adapters.zero_grad()  # and none where x needs no gradient
    x = torch.randn(TOKENS, SIDE, dtype=base)
    assert allocations_of(lambda: layer(x).sum().backward()) == []


@big_dtypes
def test_a_weight_sized_tensor_is_seen_in_forward_and_in_backward(base, adapter):
    """The controls: scaling the weight instead of x, and its gradient through the weight."""
    weight = torch.randn(SIDE, SIDE, dtype=base)
    scale = torch.ones(SIDE, dtype=adapter, requires_grad=True)
    x = torch.randn(TOKENS, SIDE, dtype=base)
    whole = SIDE * SIDE * base.itemsize
    found = allocations_of(lambda: x @ (weight * scale).to(base).T)
    assert found
    assert min(found) >= whole
    y = x @ (weight * scale).to(base).T
    assert len(allocations_of(lambda: y.sum().backward())) >= 2  # dW and dW * W


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_weight_sized_tensor_inside_the_operator_is_seen(where, monkeypatch):
    layer = make(dk.LoRA(r=4), shape=(SIDE, SIDE))
    right = getattr(aten, where)

    def wasteful(*args):
        position = 3 if where == "forward" else 4
        down, up = args[position], args[position + 1]
        assert (up @ down).shape == (SIDE, SIDE)
        return right(*args)

    monkeypatch.setattr(aten, where, wasteful)
    monkeypatch.setattr(native_library, "autograd_node", lambda: None)
    assert allocations_of(step(layer, FP32)) == [SIDE * SIDE * 4]


@pytest.mark.parametrize("name", sorted(set(UNMAPPED) - {"dora-peft-dropout"}))
def test_neither_x_nor_dy_is_converted_as_a_whole(name):
    """Between float32 adapters and a bf16 base: blocks are converted, not the activations."""
    layer = make(UNMAPPED[name], BF16, FP32, shape=(384, 384))
    x = torch.randn(2048, 384, dtype=BF16, requires_grad=True)
    whole = 2048 * 384 * 4
    assert allocations_of(lambda: layer(x).sum().backward(), whole) == []
    assert allocations_of(lambda: x.float(), whole) == [whole]


# --- consumers that change y in place -------------------------------------------------------------

CONSUMERS = {
    "none": (lambda y: y, lambda y: y),
    "relu": (nn.ReLU(inplace=True), F.relu),
    "add": (lambda y: y.add_(1), lambda y: y + 1),
    "mul": (lambda y: y.mul_(y.detach().cos()), lambda y: y * y.detach().cos()),
    "zero a row": (lambda y: y.index_fill_(0, torch.tensor([1]), 0.0),
                   lambda y: y * torch.tensor([1.0, 0, 1, 1])[:, None]),
}  # fmt: skip
consumers = pytest.mark.parametrize("consumer", CONSUMERS)


def operands(bias=True):
    """Operands of the operator with exact zeros in out_scale, float64."""
    shapes = {
        "x": (4, K), "weight": (N, K), "down": (r, K), "up": (N, r), "out_scale": (N,),
        "in_scale": (K,), "bias": (N,),
    }  # fmt: skip
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    made["out_scale"][::3] = 0.0
    if not bias:
        del made["bias"]
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def formula(x, weight, down, up, out_scale, in_scale, bias=None):
    X = x * in_scale
    z = X @ weight.T + 0.7 * (X @ down.T) @ up.T
    return z * out_scale if bias is None else z * out_scale + bias


@consumers
@pytest.mark.parametrize("impl", ["reference", "aten"])
def test_in_place_consumers_and_zeros_in_out_scale(consumer, impl):
    in_place, plain = CONSUMERS[consumer]
    tensors = operands()
    y = in_place(decomposed_linear(**tensors, scale=0.7, impl=impl))
    truth = plain(formula(**tensors))
    assert relative_error(y, truth) < 1e-13
    ours = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    exact = torch.autograd.grad(truth.square().sum(), list(tensors.values()))
    for name, mine, right in zip(tensors, ours, exact, strict=True):
        assert torch.isfinite(mine).all(), name
        assert relative_error(mine, right) < 1e-12, name


@consumers
@pytest.mark.parametrize("name", ["ia3", "ssb", "dora", "lora"])
def test_layers_with_in_place_consumers(name, consumer):
    """A layer before an in-place consumer, with zeroed outputs, beside one before a plain one."""
    in_place, plain = CONSUMERS[consumer]
    layer = make(KEEPS[name][0], torch.float64)
    scales = [
        t for n, t in layer.adapters.named_parameters() if n[-9:] in ("out_scale", "magnitude")
    ]
    with torch.no_grad():
        for scale in scales:
            scale[::3] = 0.0
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(tensor for tensor in layer.parameters() if tensor.requires_grad)]
    ours = torch.autograd.grad(in_place(layer(x)).square().sum(), leaves)
    exact = torch.autograd.grad(plain(layer(x)).square().sum(), leaves)
    for mine, right in zip(ours, exact, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, right) < 1e-12
    assert len(scales) == (name != "lora")


def test_save_output_keeps_y_instead_of_z():
    tensors = operands(bias=False)
    with torch.no_grad():
        tensors["out_scale"].copy_(torch.rand(N) + 0.5)
    made = []
    total, extra = kept(
        lambda: made.append(decomposed_linear(**tensors, scale=0.7, save_output=True)),
        tensors.values(),
    )
    (y,) = made
    assert total == 4 * (r + N) * 8  # t and y
    assert any(tensor.data_ptr() == y.data_ptr() for tensor in extra)
    ours = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    exact = torch.autograd.grad(formula(**tensors).square().sum(), list(tensors.values()))
    for name, mine, right in zip(tensors, ours, exact, strict=True):
        assert relative_error(mine, right) < 1e-12, name


@pytest.mark.parametrize("consumer", ["relu", "add", "mul"])
def test_save_output_refuses_in_place_consumers(consumer):
    tensors = operands(bias=False)
    y = CONSUMERS[consumer][0](decomposed_linear(**tensors, save_output=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
