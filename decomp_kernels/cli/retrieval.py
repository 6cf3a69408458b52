"""Retrieval: learn that query i belongs to document i; measured by recall@1 and @10.

    e(t)  mean of the last hidden states over t's tokens (or the first token's), length 1
    loss  cross entropy of 20 e(q_i) . e(d_j) over j, and over i, averaged (in-batch contrastive)

A document that occurs twice in a batch is no wrong answer: its other copies are left out.
A held-out query is ranked against every different held-out document; ties count against it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.cli.tasks import Scores, by_length, cut, pad

TEMPERATURE = 20.0
RANKS = (1, 10)


class Retrieval:
    """train, held_out: (query, document) pairs.  Texts are cut to ``max_length`` tokens."""

    metrics: tuple[str, ...] = tuple(f"recall@{k}" for k in RANKS)
    higher_is_better = True

    def __init__(
        self,
        train: list[tuple[str, ...]],
        held_out: list[tuple[str, ...]],
        tokenizer: Any,
        max_length: int,
        pooling: str,
    ) -> None:
        self.tokenizer, self.pooling = tokenizer, pooling
        self.queries = cut(tokenizer, [query for query, _ in train], max_length)
        self.documents = cut(tokenizer, [document for _, document in train], max_length)
        self.held_queries = cut(tokenizer, [query for query, _ in held_out], max_length)
        self.held_documents = cut(tokenizer, [document for _, document in held_out], max_length)
        self.numbers, self.held_numbers = _numbers(self.documents), _numbers(self.held_documents)
        self.size = len(train)

    def loss(self, model: nn.Module, rows: list[int]) -> Tensor:
        q = self._embed(model, [self.queries[row] for row in rows])
        d = self._embed(model, [self.documents[row] for row in rows])
        copies = _equal(self.numbers[rows]).fill_diagonal_(False).to(q.device)
        scores = (TEMPERATURE * q @ d.T).masked_fill(copies, float("-inf"))
        target = torch.arange(len(rows), device=q.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch_size: int) -> dict[str, Scores]:
        """Per held-out query: 1 where its document is among the first k, else 0."""
        q = self._embed_all(model, self.held_queries, batch_size)
        d = self._embed_all(model, self.held_documents, batch_size)
        numbers = self.held_numbers
        once = torch.zeros(len(d), dtype=torch.bool)
        once[[numbers.tolist().index(number) for number in range(int(numbers.max()) + 1)]] = True
        better = torch.empty(len(q), dtype=torch.long)
        for start in range(0, len(q), batch_size):  # queries x documents would be a large tensor
            rows = slice(start, start + batch_size)
            own = (q[rows] * d[rows]).sum(1)
            below = q[rows] @ d[once].T < own[:, None]  # NaN is below nothing
            better[rows] = (~below & (numbers[rows, None] != numbers[once])).sum(1)
        ones = torch.ones(len(q), dtype=torch.float64)
        return {f"recall@{k}": Scores((better < k).double(), ones) for k in RANKS}

    @torch.no_grad()
    def outputs(self, model: nn.Module, count: int) -> Tensor:
        """The embeddings of the first held-out queries, [count, width], for comparisons."""
        return self._embed(model, self.held_queries[:count])

    def _embed_all(self, model: nn.Module, texts: list[list[int]], batch_size: int) -> Tensor:
        parts, order = [], by_length(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            parts.append(self._embed(model, [texts[row] for row in rows]).float().cpu())
        embedded = torch.cat(parts)
        return torch.empty_like(embedded).index_copy_(0, torch.tensor(order), embedded)

    def _embed(self, model: nn.Module, texts: list[list[int]]) -> Tensor:
        ids, mask = pad(texts, self.tokenizer.pad_token_id, next(model.parameters()).device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        weight = mask.to(hidden.dtype)[..., None]
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def _numbers(texts: list[list[int]]) -> Tensor:
    """Equal texts have equal numbers, [texts]."""
    known: dict[tuple[int, ...], int] = {}
    return torch.tensor([known.setdefault(tuple(text), len(known)) for text in texts])


def _equal(numbers: Tensor) -> Tensor:
    return numbers[:, None] == numbers
