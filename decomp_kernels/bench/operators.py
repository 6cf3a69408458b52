"""A call of every operator of ours, at any size: for micro-benchmarks and for opcheck.

{operator: its arguments}       tests/test_bench_operators.py: every registered one is there
"""

from collections.abc import Callable
from importlib import import_module
from math import gcd
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

import decomp_kernels.ops

NAMESPACE = "decomp_kernels"


def registered() -> set[str]:
    """The names of all operators, with every file of ops/ imported."""
    for module in iter_modules(decomp_kernels.ops.__path__):
        import_module(f"decomp_kernels.ops.{module.name}")
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {
        name.removeprefix(f"{NAMESPACE}::") for name in names if name.startswith(f"{NAMESPACE}::")
    }


def operator(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def samples(
    M: int, N: int, K: int, R: int, dtype: torch.dtype = torch.float32, impl: str = "aten"
) -> dict[str, tuple[Any, ...]]:
    """Random arguments: M tokens, W [N, K], rank R; matrices in ``dtype``, scales in float32.

    N and K must have a common divisor, and K be even (the parts of a Kronecker product, blocks).
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def scales(*shape: int) -> Tensor:
        return random(*shape, dtype=torch.float32)

    x, dy, W = random(M, K), random(M, N), random(N, K)
    down, up, core, seed = random(R, K), random(N, R), scales(R), torch.tensor(7)
    terms = (random(N), down, up, core, scales(K), scales(N))  # from the bias to out_scale
    options = (0.5, 0.2, "relu")
    block, part, rank = gcd(K // 2, 32), gcd(N, K, 16), min(N, K)
    blocks, order = random(1, K // block, block, block), torch.randperm(K, generator=generator)
    rotation = (blocks, order[None])
    diagonal = (random(N, rank), scales(rank), random(rank, K))
    chosen = torch.randperm(N * K, generator=generator)[: min(R * (N + K), N * K // 4)].sort()
    places = (chosen.values // K, chosen.values % K, scales(chosen.values.numel()))
    kron = (random(part, part), random(N // part, K // part))
    codes = torch.randint(256, (N * K // 2, 1), generator=generator, dtype=torch.uint8)
    group: list[list[Any]] = [[None] for _ in range(8)]
    group[0], group[2], group[3] = [W], [down], [up]  # one layer: weight, down and up
    group += [[0.5], [0.0], ["identity"]]
    grams, residuals = ([down, down], [up, up]), [scales(2, R, R)] * 2
    sums, ones = W.float().square().sum(1), scales(N)
    return {
        "decomposed_linear_fwd":
            (x, W, None, "dense", *terms, dy, seed, *options, [True, True], impl),
        "decomposed_linear_bwd":
            (dy, x, W, None, "dense", *terms, random(M, R), dy, seed, *options, [True] * 9, impl),
        "grouped_linear_fwd": (x, *group, [True, False], impl),
        "grouped_linear_bwd":
            ([dy], x, *group, [random(M, R)], [None],
             [True, False, True, True, False, False, False], impl),
        "row_norm_fwd": (W, sums, down, up, 0.5, impl),
        "row_norm_bwd": (ones, ones.abs() + 1.0, W, down, up, 0.5, impl),
        "squared_rows": (W,),
        "counter_dropout": (x, seed, 0.5),
        "dequantize": (codes, scales(N * K // 32).abs(), "nf4", N, K, dtype, impl),
        "frozen_matmul_fwd": (W, None, "dense", scales(K, R)),
        "frozen_matmul_bwd": (W, None, "dense", scales(N, R)),
        "gram_fwd": (*grams, "o", True, 0.5, impl),
        "gram_bwd": (scales(), *grams, residuals, True, 0.5, impl),
        "kron_linear_fwd": (x, *kron, impl),
        "kron_linear_bwd": (dy, x, *kron, [True] * 3, impl),
        "block_rotate_fwd": (x, *rotation, impl),
        "block_rotate_bwd": (x, x, *rotation, impl),
        "block_rotate_build": (W, *rotation, impl),
        "block_rotate_contract": (W, dy, x, *rotation, impl),
        "hadamard_build": (W, up, down, 0.5, impl),
        "hadamard_contract": (W, dy, x, up, down, 0.5, impl),
        "double_hadamard_build": (W, up, down, up, down, 0.5, impl),
        "double_hadamard_contract": (W, dy, x, up, down, up, down, 0.5, impl),
        "singular_diagonal_build": (W, *diagonal, impl),
        "singular_diagonal_contract": (W, dy, x, *diagonal, impl),
        "scatter_build": (W, *places, impl),
        "scatter_contract": (W, dy, x, *places, impl),
    }  # fmt: skip
