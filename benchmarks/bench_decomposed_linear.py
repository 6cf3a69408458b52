"""The operator with the terms of each family of methods, next to the frozen F.linear."""

import cases
import pytest
import torch
from torch.nn import functional as F

from decomp_kernels.ops.decomposed_linear import decomposed_linear


def _terms(name, shape, dtype):
    _, K, N = shape
    in_scale, out_scale = cases.scales(K), cases.scales(N)
    return {
        "frozen": {},
        "lora": cases.low_rank(shape, dtype),
        "lora_dropout": cases.low_rank(shape, dtype) | {"dropout": 0.05},
        "lora_fp32": cases.low_rank(shape, torch.float32),
        "core": cases.low_rank(shape, dtype) | {"core": cases.scales(cases.RANK)},
        "dora": cases.low_rank(shape, dtype) | {"out_scale": out_scale},
        "ssl": {"in_scale": in_scale},
        "ia3": {"out_scale": out_scale},
        "ssb": {"in_scale": in_scale, "out_scale": out_scale},
    }[name]


NAMES = [
    "frozen", "lora", "lora_dropout", "lora_fp32", "core", "dora", "ssl", "ia3", "ssb",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", [cases.forward, cases.both], ids=["forward", "both"])
def bench_decomposed_linear(benchmark, phase, name, shape, dtype):
    x, weight = cases.linear(shape, dtype)
    terms = _terms(name, shape, dtype)
    run = F.linear if name == "frozen" else decomposed_linear
    leaves = [x, *(t for t in terms.values() if torch.is_tensor(t))]
    group = f"decomposed_linear {shape} {dtype}"
    if phase is cases.forward:
        cases.forward(benchmark, group, lambda: run(x, weight, **terms))
    else:
        cases.both(benchmark, group, lambda: run(x, weight, **terms), *leaves)
