"""What a task is to the job: a loss over training rows, and scores of held-out rows.

metric = sum(values) / sum(weights) over the held-out rows, so that rows can be resampled
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Scores(NamedTuple):
    """One metric of every held-out row, float64 [rows]."""

    values: Tensor
    weights: Tensor

    @property
    def metric(self) -> float:
        return (self.values.sum() / self.weights.sum()).item()


class Task(Protocol):
    metrics: tuple[str, ...]
    higher_is_better: bool
    size: int  # training rows

    def loss(self, model: nn.Module, rows: list[int]) -> Tensor: ...

    def evaluate(self, model: nn.Module, batch_size: int) -> dict[str, Scores]: ...

    def outputs(self, model: nn.Module, count: int) -> Tensor: ...


def gain_interval(
    before: Scores, after: Scores, higher_is_better: bool, seed: int, resamples: int = 10_000
) -> tuple[float, float, float]:
    """(gain, low, high): the gain of ``after`` and its bootstrap 95 % interval.

    Rows are drawn with replacement, both models' scores of a row together (a paired bootstrap);
    the interval is from the 2.5 to the 97.5 percentile.  A gain is positive where ``after`` is
    better.
    """
    sign = 1.0 if higher_is_better else -1.0
    change, weights = sign * (after.values - before.values), before.weights
    generator = torch.Generator().manual_seed(seed)
    rows, gains = len(change), []
    at_once = max(1, 4_000_000 // rows)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = torch.randint(rows, (count, rows), generator=generator)
        gains.append(change[drawn].sum(1) / weights[drawn].sum(1))
    low, high = torch.cat(gains).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return (change.sum() / weights.sum()).item(), low.item(), high.item()


def cut(tokenizer: Any, texts: list[str], length: int, special: bool = True) -> list[list[int]]:
    """Token ids of each text, at most ``length`` of them."""
    return tokenizer(
        texts, truncation=True, max_length=length, add_special_tokens=special,
        return_attention_mask=False, return_token_type_ids=False,
    )["input_ids"]  # fmt: skip


def pad(rows: list[list[int]], with_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [rows, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [with_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids.to(device), mask.to(device)


def by_length(rows: list[list[int]]) -> list[int]:
    """Row numbers, shortest first: batches of like lengths have little padding."""
    return sorted(range(len(rows)), key=lambda row: len(rows[row]))
