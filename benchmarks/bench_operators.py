"""Every registered operator by itself, forward and backward ones apart, as the dispatcher calls it.

The other files time the public functions beside what a user would write without them.
"""

import cases
import pytest
import torch

from decomp_kernels.bench import operators


@pytest.mark.parametrize("name", sorted(operators.registered()))
def bench_operator(benchmark, name, shape, dtype):
    M, K, N = shape
    call = operators.operator(name)
    arguments = operators.samples(M, N, K, cases.RANK, dtype, "auto")[name]
    benchmark.group = f"operators {shape} {dtype}"
    with torch.no_grad():
        benchmark(lambda: call(*arguments))
