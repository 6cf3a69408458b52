"""q, k and v: three adapted linears of one x in one call, next to three calls."""

import cases
import pytest
import torch

from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.grouped_linear import decomposed_linears

LAYERS = 3


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("phase", ["forward", "both"])
def bench_grouped_linear(benchmark, phase, joined, shape, dtype):
    x, weight = cases.linear(shape, dtype)
    layers = [{"weight": weight.clone(), **cases.low_rank(shape, dtype)} for _ in range(LAYERS)]
    leaves = [x, *(layer[name] for layer in layers for name in ("down", "up"))]

    def run():
        if joined:
            return torch.stack(decomposed_linears(x, layers))
        return torch.stack([decomposed_linear(x, **layer) for layer in layers])

    group = f"grouped_linear {shape} {dtype}"
    if phase == "forward":
        cases.forward(benchmark, group, run)
    else:
        cases.both(benchmark, group, run, *leaves)
