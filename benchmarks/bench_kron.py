"""y = x (left kron right)^T without the product, next to forming it."""

import cases
import torch
from torch.nn import functional as F

from decomp_kernels.ops.kron import kron_linear


def _factors(shape, dtype):
    _, K, N = shape
    return cases.leaf(16, 16, dtype=dtype), cases.leaf(N // 16, K // 16, dtype=dtype, std=0.02)


def bench_kron(benchmark, shape, dtype):
    x, _ = cases.linear(shape, dtype)
    left, right = _factors(shape, dtype)
    cases.both(
        benchmark, f"kron {shape} {dtype}", lambda: kron_linear(x, left, right), x, left, right
    )


def bench_kron_formed(benchmark, shape, dtype):
    x, _ = cases.linear(shape, dtype)
    left, right = _factors(shape, dtype)
    cases.both(
        benchmark, f"kron {shape} {dtype}", lambda: F.linear(x, torch.kron(left, right)),
        x, left, right,
    )  # fmt: skip
