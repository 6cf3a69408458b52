"""What the grouped operator must compute, against separate calls in float64."""

import torch
from triton_checks import DROPOUT, DTYPES, SEED, tensor

from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.grouped_linear import decomposed_linears
from decomp_kernels.testing import assert_as_good_as

ALL = {**DTYPES, "fp64": (torch.float64, torch.float64)}
# name: rank (0: no branch), dropout, activation, scale, terms
LAYERS = {
    "lora": (4, 0.0, "identity", 0.5, ()),
    "dropout": (5, DROPOUT, "gelu", 0.7, ("bias",)),
    "another mask": (3, 0.5, "identity", 1.0, ("core", "out_scale", "bias")),
    "no branch": (0, 0.0, "identity", 1.0, ("bias",)),
    "dora": (4, 0.0, "tanh", 2.0, ("out_scale",)),
    "in_scale": (2, DROPOUT, "identity", 1.5, ("in_scale",)),
    "everything": (6, 0.0, "silu", 0.3, ("core", "in_scale", "out_scale", "bias")),
    "ia3": (0, 0.0, "identity", 1.0, ("in_scale", "out_scale")),
}


def make(names, dtype, shape=(3, 5), K=30):
    """x and the mappings of the named layers; every tensor but the weights requires grad."""
    base, adapter = ALL[dtype]
    wide = torch.promote_types(base, torch.float32)
    layers = []
    for number, name in enumerate(names):
        r, dropout, activation, scale, terms = LAYERS[name]
        N = 11 + 4 * number
        sizes = {
            "bias": (N, base),
            "core": (r, wide),
            "in_scale": (K, wide),
            "out_scale": (N, wide),
        }
        layer = {"weight": tensor(N, K, dtype=base, seed=10 * number)}
        layer |= {
            term: tensor(sizes[term][0], dtype=sizes[term][1], seed=10 * number + 3 + place)
            for place, term in enumerate(terms)
        }
        if r:
            layer["down"] = tensor(r, K, dtype=adapter, seed=10 * number + 1)
            layer["up"] = tensor(N, r, dtype=adapter, seed=10 * number + 2)
        for name in layer.keys() - {"weight"}:
            layer[name].requires_grad_()
        seed = torch.tensor(SEED + number, device=layer["weight"].device)
        options = {"dropout": dropout, "activation": activation, "scale": scale, "seed": seed}
        layers.append(layer | (options if r else {}))
    return tensor(*shape, K, dtype=base, seed=99).requires_grad_(), layers


def separately(x, layers, impl="aten"):
    return [decomposed_linear(x, **layer, impl=impl) for layer in layers]


def trained(x, layers):
    tensors = {"x": x} if x.requires_grad else {}
    for number, layer in enumerate(layers):
        tensors |= {
            f"{number}.{name}": value
            for name, value in layer.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
    return tensors


def outcome(ys, x, layers):
    """Outputs and gradients by name."""
    dys = [tensor(*y.shape, dtype=y.dtype, seed=200 + number) for number, y in enumerate(ys)]
    wanted = trained(x, layers)
    grads = torch.autograd.grad(ys, list(wanted.values()), dys)
    return {f"y{number}": y for number, y in enumerate(ys)} | dict(zip(wanted, grads, strict=True))


def exactly(x, layers):
    wide = [
        {
            name: value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in layer.items()
        }
        for layer in layers
    ]
    x = x.detach().double().requires_grad_(x.requires_grad)
    return outcome(separately(x, wide, "reference"), x, wide)


def check(names, dtype, impl, **sizes):
    """As good as separate calls; a float32 or float64 result, to that dtype's precision."""
    x, layers = make(names, dtype, **sizes)
    found = outcome(decomposed_linears(x, layers, impl=impl), x, layers)
    eager = outcome(separately(x, layers), x, layers)
    exact = exactly(x, layers)
    for name, value in found.items():
        assert value.dtype == eager[name].dtype, name
        assert_as_good_as(value, eager[name], exact[name], f"{dtype} {name}", x.dtype)
