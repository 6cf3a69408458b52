"""Dropout whose mask a counter makes again in backward, next to F.dropout, which keeps it."""

import cases
from torch.nn import functional as F

from decomp_kernels.ops.dropout import counter_dropout


def bench_counter_dropout(benchmark, shape, dtype):
    x, _ = cases.linear(shape, dtype)
    cases.both(benchmark, f"dropout {shape} {dtype}", lambda: counter_dropout(x, 0.05), x)


def bench_library_dropout(benchmark, shape, dtype):
    x, _ = cases.linear(shape, dtype)
    cases.both(benchmark, f"dropout {shape} {dtype}", lambda: F.dropout(x, 0.05), x)
