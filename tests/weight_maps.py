"""What the tests of the weight maps share: the operator with a map against a dense formula."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decomp_kernels.kernels import gemm
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.testing import assert_as_good_as, relative_error

IMPLS = ("reference", "aten")
DTYPES = {  # of W and x, and of the map's tensors
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
impls = pytest.mark.parametrize("impl", IMPLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def small_blocks(monkeypatch):
    """Walk in blocks of a few rows, so that the small tensors of a test need many."""
    monkeypatch.setattr(gemm.row_blocks, "__defaults__", (64, None))
    monkeypatch.setattr(gemm.outer_blocks, "__defaults__", (64,))
    monkeypatch.setattr(gemm, "OUTER_ELEMENTS", 64)


def random(shape, dtype, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (size * made).to(torch.get_default_device(), dtype)


def order(count, generator):
    """A random order of ``count`` places."""
    drawn = torch.randperm(count, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def layer(N, K, dtype, tokens=(3, 5), terms=()):
    """x, weight and the other terms of the operator that are named; all but the weight train."""
    base, adapter = DTYPES[dtype]
    r = 3
    sizes = {
        "x": ((*tokens, K), base),
        "weight": ((N, K), base),
        "bias": ((N,), base),
        "down": ((r, K), adapter),
        "up": ((N, r), adapter),
        "core": ((r,), torch.promote_types(base, torch.float32)),
        "in_scale": ((K,), torch.promote_types(base, torch.float32)),
        "out_scale": ((N,), torch.promote_types(base, torch.float32)),
        "addend": ((*tokens, N), base),
    }
    return {
        name: random(shape, kind, seed).requires_grad_(name != "weight")
        for seed, (name, (shape, kind)) in enumerate(sizes.items())
        if name in ("x", "weight", *terms)
    }


def formula(t, dense, mapped, scale):
    """The operator with W' = dense(W, **mapped) in plain PyTorch, in the tensors' own dtypes."""
    x = t["x"]
    X = x if "in_scale" not in t else (x * t["in_scale"]).to(x.dtype)
    z = X @ dense(t["weight"], **mapped).to(x.dtype).T
    if "down" in t:
        h = X.to(t["down"].dtype) @ t["down"].T
        h = h if "core" not in t else (h * t["core"]).to(h.dtype)
        z = (z + scale * (h @ t["up"].T)).to(x.dtype)
    z = z if "addend" not in t else z + t["addend"]
    y = z if "out_scale" not in t else z * t["out_scale"]
    return (y if "bias" not in t else y + t["bias"]).to(x.dtype)


def outcome(y, leaves, dy):
    return dict(zip(("y", *leaves), (y, *torch.autograd.grad(y, list(leaves.values()), dy))))


def check(kind, dense, mapped, terms, impl, **options):
    """y and every gradient of the operator with kind(**mapped), in float64 or against eager."""
    scale = 0.7
    exact_terms = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in terms.items()}
    exact_mapped = {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for k, v in mapped.items()
    }

    def leaves(terms, mapped):
        return {k: v for k, v in {**terms, **mapped}.items() if v.requires_grad}

    y = decomposed_linear(**terms, weight_map=kind(**mapped, **options), scale=scale, impl=impl)
    dy = random(y.shape, y.dtype, 99)
    ours = outcome(y, leaves(terms, mapped), dy)
    plain = outcome(formula(terms, dense, mapped, scale), leaves(terms, mapped), dy)
    truth = outcome(
        formula(exact_terms, dense, exact_mapped, scale),
        leaves(exact_terms, exact_mapped),
        dy.double(),
    )
    change = formula(exact_terms, lambda W, **_: W, exact_mapped, scale) - truth["y"]
    assert change.norm() > 0.05 * truth["y"].norm(), "the map must move the output"
    for name, value in ours.items():
        if value.dtype == torch.float64:
            assert relative_error(value, truth[name]) < 1e-12, name
        else:
            assert value.dtype == ({**terms, **mapped} | {"y": terms["x"]})[name].dtype
            assert_as_good_as(value, plain[name], truth[name], name, terms["x"].dtype)


def check_build(build, dense, mapped, weight):
    """One rounding of the float64 result, but for float32 noise; under autocast the same bits."""
    exact = dense(weight.double(), **{k: _double(v) for k, v in mapped.items()})
    with torch.no_grad():
        built = build(weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(build(weight), built), "autocast must not reach the products"
    assert built.dtype == weight.dtype and built.is_contiguous()
    nearest = exact.to(weight.dtype).double()
    noise = 4e-6 * exact.abs().max() if weight.dtype != torch.float64 else 1e-12
    assert (built.double() - exact).norm() <= (nearest - exact).norm() + noise


def _double(t):
    return t.detach().double() if t.is_floating_point() else t


def saved_beyond(inputs, call):
    """Elements that autograd keeps beside the inputs' own storages."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    y.sum().backward()
    return sum(kept)


class _Largest(TorchDispatchMode):
    def __init__(self, dtypes):
        super().__init__()
        self.dtypes, self.elements = dtypes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.dtype in self.dtypes:
                storage = t.untyped_storage()
                if storage.data_ptr() not in known:
                    self.elements = max(self.elements, storage.nbytes() // t.itemsize)
        return out


def largest_temporary(call, dtypes=(torch.float32,)):
    """Elements of the largest tensor of these dtypes that ``call`` makes."""
    with torch.no_grad(), _Largest(dtypes) as seen:
        call()
    return seen.elements


def check_compiles(kind, mapped, terms, **options):
    """A function of the map's tensors, compiled whole, with its gradients."""
    leaves = {k: v for k, v in {**terms, **mapped}.items() if v.requires_grad}

    def call(terms, mapped):
        return decomposed_linear(**terms, weight_map=kind(**mapped, **options))

    eager = call(terms, mapped)
    dy = torch.randn_like(eager)
    expected = outcome(eager, leaves, dy)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, value in outcome(compiled(terms, mapped), leaves, dy).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def check_trained_weight(kind, dense, mapped, **options):
    """A base weight that requires grad gets its dense gradient, through the map."""
    N, K = 9, 12
    terms = layer(N, K, "fp64", terms=("bias", "out_scale"))
    terms["weight"].requires_grad_()
    check(kind, dense, mapped, terms, "aten", **options)
