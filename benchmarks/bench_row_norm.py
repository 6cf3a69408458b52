"""DoRA's row norm without B A, next to forming B A."""

import cases
import torch

from decomp_kernels.ops.row_norm import row_norm, squared_rows


def bench_row_norm(benchmark, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    terms, kept = cases.low_rank(shape, dtype), squared_rows(weight)
    with torch.no_grad():
        cases.forward(
            benchmark, f"row_norm {shape} {dtype}",
            lambda: row_norm(weight, **terms, scale=2.0, weight_sq=kept),
        )  # fmt: skip


def bench_row_norm_formed(benchmark, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    terms = cases.low_rank(shape, dtype)
    with torch.no_grad():
        cases.forward(
            benchmark, f"row_norm {shape} {dtype}",
            lambda: (weight + 2.0 * terms["up"] @ terms["down"]).norm(dim=1),
        )  # fmt: skip


def bench_row_norm_with_gradient(benchmark, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    terms, kept = cases.low_rank(shape, dtype), squared_rows(weight)
    cases.both(
        benchmark, f"row_norm {shape} {dtype}",
        lambda: row_norm(weight, **terms, scale=2.0, weight_sq=kept), *terms.values(),
    )  # fmt: skip
