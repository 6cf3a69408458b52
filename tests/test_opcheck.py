"""Every operator of ours passes opcheck with a sample here; a new one fails until it has one.

What its dtypes, layouts and forms need beyond that is the business of its own test file.
"""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import decomp_kernels.ops

M, N, K, R = 5, 12, 8, 4


def samples():
    """{operator: its arguments}; M tokens, W [N, K], rank R."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x, dy, W = random(M, K), random(M, N), random(N, K)
    down, up, core, seed = random(R, K), random(N, R), random(R), torch.tensor(7)
    terms = (random(N), down, up, core, random(K), random(N))  # from the bias to out_scale
    options = (0.5, 0.2, "relu")
    blocks, order = random(1, 2, 4, 4), torch.randperm(K, generator=generator)[None]
    diagonal = (random(N, K), random(K), random(K, K))
    places = (torch.tensor([0, 3, 11]), torch.tensor([7, 0, 2]), random(3))
    group = [[None] for _ in range(8)]
    group[0], group[2], group[3] = [W], [down], [up]  # one layer: weight, down and up
    group += [[0.5], [0.0], ["identity"]]
    grams = ([down, down], [up, up])
    return {
        "decomposed_linear_fwd":
            (x, W, None, "dense", *terms, dy, seed, *options, [True, True], "aten"),
        "decomposed_linear_bwd":
            (dy, x, W, None, "dense", *terms, random(M, R), dy, seed, *options, [True] * 9, "aten"),
        "grouped_linear_fwd": (x, *group, [True, False], "aten"),
        "grouped_linear_bwd":
            ([dy], x, *group, [random(M, R)], [None],
             [True, False, True, True, False, False, False], "aten"),
        "row_norm_fwd": (W, W.square().sum(1), down, up, 0.5, "aten"),
        "row_norm_bwd": (random(N), random(N).abs(), W, down, up, 0.5, "aten"),
        "squared_rows": (W,),
        "counter_dropout": (x, seed, 0.5),
        "dequantize":
            (torch.zeros(N * K // 2, 1, dtype=torch.uint8), random(N * K // 32), "nf4", N, K,
             torch.float32, "aten"),
        "frozen_matmul_fwd": (W, None, "dense", random(K, R)),
        "frozen_matmul_bwd": (W, None, "dense", random(N, R)),
        "gram_fwd": (*grams, "o", True, 0.5, "aten"),
        "gram_bwd": (random(()), *grams, [random(2, R, R)] * 2, True, 0.5, "aten"),
        "kron_linear_fwd": (x, random(3, 2), random(4, 4), "aten"),
        "kron_linear_bwd": (dy, x, random(3, 2), random(4, 4), [True] * 3, "aten"),
        "block_rotate_fwd": (x, blocks, order, "aten"),
        "block_rotate_bwd": (x, x, blocks, order, "aten"),
        "block_rotate_build": (W, blocks, order, "aten"),
        "block_rotate_contract": (W, dy, x, blocks, order, "aten"),
        "hadamard_build": (W, up, down, 0.5, "aten"),
        "hadamard_contract": (W, dy, x, up, down, 0.5, "aten"),
        "double_hadamard_build": (W, up, down, up, down, 0.5, "aten"),
        "double_hadamard_contract": (W, dy, x, up, down, up, down, 0.5, "aten"),
        "singular_diagonal_build": (W, *diagonal, "aten"),
        "singular_diagonal_contract": (W, dy, x, *diagonal, "aten"),
        "scatter_build": (W, *places, "aten"),
        "scatter_contract": (W, dy, x, *places, "aten"),
    }  # fmt: skip


SAMPLES = samples()


def test_every_operator_has_a_sample():
    for module in iter_modules(decomp_kernels.ops.__path__):
        import_module(f"decomp_kernels.ops.{module.name}")
    registered = {
        schema.name.removeprefix("decomp_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("decomp_kernels::")
    }
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    op = getattr(torch.ops.decomp_kernels, name).default
    found = torch.library.opcheck(op, SAMPLES[name])
    assert set(found.values()) == {"SUCCESS"}
    results = op(*SAMPLES[name])
    results = results if isinstance(results, (tuple, list)) else [results]
    flat = [t for r in results for t in (r if isinstance(r, (tuple, list)) else [r])]
    assert any(t.numel() for t in flat) and all(torch.isfinite(t).all() for t in flat)
