"""Operands and steps that the operators' benchmarks share: random data, never zeros.

pytest-benchmark runs its cases one after another, so compare medians within one group and run;
ratios to a frozen layer come from the interleaved ``decomp-kernels bench layer``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int]  # M tokens, K in, N out

SMALL: list[Shape] = [(64, 256, 320)]
LARGE: list[Shape] = [(512, 1024, 1024), (512, 2048, 2048)]
RANK = 16


def randn(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).mul_(std).to(dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return randn(*shape, dtype=dtype, std=std).requires_grad_()


def linear(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K], a leaf, and a frozen weight [N, K]."""
    M, K, N = shape
    return leaf(M, K, dtype=dtype), randn(N, K, dtype=dtype, std=K**-0.5)


def low_rank(shape: Shape, dtype: torch.dtype, rank: int = RANK) -> dict[str, Tensor]:
    """down [r, K] and up [N, r], trained, away from their start."""
    _, K, N = shape
    return {
        "down": leaf(rank, K, dtype=dtype, std=K**-0.5),
        "up": leaf(N, rank, dtype=dtype, std=0.02),
    }


def scales(count: int) -> Tensor:
    """Trained float32 scales around 1."""
    return (1.0 + randn(count, std=0.1)).requires_grad_()


def forward(benchmark: Any, group: str, function: Callable[[], Tensor]) -> None:
    """Time ``function`` alone, autograd recording."""
    benchmark.group = f"{group}, forward"
    benchmark(function)


def both(benchmark: Any, group: str, function: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Time ``function`` and its backward; the gradients are dropped before each."""
    benchmark.group = f"{group}, forward + backward"
    dy = torch.randn_like(function().detach())

    def drop() -> None:
        for tensor in leaves:
            tensor.grad = None

    def step() -> None:
        drop()
        function().backward(dy)

    benchmark(step)
