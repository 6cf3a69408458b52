"""Every weight map through the operator: W_eff made in forward and again in backward."""

import cases
import pytest
import torch
from torch.nn import functional as F

from decomp_kernels.factors import (
    BlockRotate,
    DoubleHadamard,
    Hadamard,
    Scatter,
    SingularDiagonal,
)
from decomp_kernels.ops.decomposed_linear import decomposed_linear

BLOCK = 32


def _hadamard(M, K, N, dtype):
    return Hadamard(**cases.low_rank((M, K, N), dtype))


def _double_hadamard(M, K, N, dtype):
    one, two = (cases.low_rank((M, K, N), dtype) for _ in "ab")
    return DoubleHadamard(one["up"], one["down"], two["up"], two["down"])


def _block_rotate(M, K, N, dtype):
    return BlockRotate(cases.leaf(1, K // BLOCK, BLOCK, BLOCK, std=BLOCK**-0.5))


def _singular_diagonal(M, K, N, dtype):
    k = min(N, K)
    left, right = cases.randn(N, k, dtype=dtype, std=k**-0.5), cases.randn(k, K, dtype=dtype)
    return SingularDiagonal(left, cases.leaf(k, std=0.02), right)


def _scatter(M, K, N, dtype):
    chosen = torch.randperm(N * K, generator=torch.Generator().manual_seed(0))[: 16 * (N + K)]
    chosen = chosen.sort().values
    return Scatter(chosen // K, chosen % K, cases.leaf(chosen.numel(), std=0.02))


MAPS = {
    "hadamard": _hadamard,
    "double_hadamard": _double_hadamard,
    "block_rotate": _block_rotate,
    "singular_diagonal": _singular_diagonal,
    "scatter": _scatter,
}


@pytest.mark.parametrize("name", ["frozen", *MAPS])
def bench_weight_map(benchmark, name, shape, dtype):
    x, weight = cases.linear(shape, dtype)
    group = f"weight maps {shape} {dtype}"
    if name == "frozen":
        cases.both(benchmark, group, lambda: F.linear(x, weight), x)
        return
    m = MAPS[name](*shape, dtype)
    leaves = [t for t in m.named_tensors().values() if t.requires_grad]
    cases.both(benchmark, group, lambda: decomposed_linear(x, weight, weight_map=m), x, *leaves)
