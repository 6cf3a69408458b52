"""The matrix pattern constraints' penalty over eight layers in one call, next to plain PyTorch."""

import cases
import pytest
import torch

from decomp_kernels.ops.gram import gram_penalty

LAYERS = 8


def _matrices(shape, dtype):
    terms = [cases.low_rank(shape, dtype) for _ in range(LAYERS)]
    return [term["down"] for term in terms], [term["up"] for term in terms]


@pytest.mark.parametrize("kind", ["o", "d"])
def bench_gram(benchmark, kind, shape, dtype):
    downs, ups = _matrices(shape, dtype)
    cases.both(
        benchmark, f"gram {kind} {shape} {dtype}", lambda: gram_penalty(downs, ups, kind),
        *downs, *ups,
    )  # fmt: skip


def bench_gram_plain(benchmark, shape, dtype):
    downs, ups = _matrices(shape, dtype)
    identity = torch.eye(cases.RANK)

    def plain():
        total = torch.zeros(())
        for down, up in zip(downs, ups, strict=True):
            A, B = down.float(), up.float()
            total = total + (A @ A.T - identity).square().sum()
            total = total + (B.T @ B - identity).square().sum()
        return total

    cases.both(benchmark, f"gram o {shape} {dtype}", plain, *downs, *ups)
