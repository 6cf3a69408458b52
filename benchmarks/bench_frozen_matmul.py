"""A frozen weight times a small trained matrix (HRA's W U), next to converting the weight."""

import cases
import torch

from decomp_kernels.ops.frozen_matmul import frozen_matmul


def bench_frozen_matmul(benchmark, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    right = cases.leaf(weight.shape[1], cases.RANK)
    cases.both(
        benchmark, f"frozen_matmul {shape} {dtype}", lambda: frozen_matmul(weight, right), right
    )


def bench_frozen_matmul_converted(benchmark, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    right = cases.leaf(weight.shape[1], cases.RANK)
    cases.both(
        benchmark, f"frozen_matmul {shape} {dtype}", lambda: weight.to(torch.float32) @ right, right
    )
