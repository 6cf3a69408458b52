"""Language modelling: learn to continue text; measured by loss per token and perplexity.

    loss = - mean over the learned tokens of log p(token | those before it)    perplexity = e^loss

Of (text,) rows every token is learned; of (prompt, completion) rows the completion's alone.  Each
row ends with the tokenizer's end token, where it has one, and is cut to ``max_length``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.tasks import Scores, by_length, cut, pad

IGNORED = -100


class Language:
    """train, held_out: (text,) or (prompt, completion) rows."""

    metrics: tuple[str, ...] = ("loss",)
    higher_is_better = False

    def __init__(
        self,
        train: list[tuple[str, ...]],
        held_out: list[tuple[str, ...]],
        tokenizer: Any,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.rows = _rows(train, tokenizer, max_length)
        self.held_rows = _rows(held_out, tokenizer, max_length)
        if not self.rows or not self.held_rows:
            raise BadInput(
                f"no row of the {'held-out' if self.rows else 'training'} data has a token to "
                f"learn within --max-length {max_length} tokens"
            )
        self.size = len(self.rows)

    def loss(self, model: nn.Module, rows: list[int]) -> Tensor:
        loss, learned = self._losses(model, [self.rows[row] for row in rows])
        return loss.sum() / learned.sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch_size: int) -> dict[str, Scores]:
        """Per held-out row: the sum of its tokens' losses, and their number."""
        order = by_length([ids for ids, _ in self.held_rows])
        sums = torch.zeros(len(order), dtype=torch.float64)
        counts = torch.zeros(len(order), dtype=torch.float64)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            loss, learned = self._losses(model, [self.held_rows[row] for row in rows])
            sums[rows], counts[rows] = loss.double().sum(1).cpu(), learned.double().sum(1).cpu()
        return {"loss": Scores(sums, counts)}

    @torch.no_grad()
    def outputs(self, model: nn.Module, count: int) -> Tensor:
        """Logits of the first held-out rows' learned places, [places, vocabulary]."""
        ids, mask, labels = self._batch(self.held_rows[:count], next(model.parameters()).device)
        return model(input_ids=ids, attention_mask=mask).logits[labels != IGNORED].float()

    def _losses(self, model: nn.Module, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """(loss of each place, 0 where nothing is learned; which places are learned) [rows, T]."""
        ids, mask, labels = self._batch(rows, next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        target = labels[:, 1:]
        loss = F.cross_entropy(
            logits.transpose(1, 2), target, ignore_index=IGNORED, reduction="none"
        )
        return loss, target != IGNORED

    def _batch(
        self, rows: list[tuple[list[int], int]], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = pad([ids for ids, _ in rows], self.tokenizer.pad_token_id, device)
        labels = ids.masked_fill(mask == 0, IGNORED)
        for row, (_, given) in enumerate(rows):
            labels[row, :given] = IGNORED
        return ids, mask, labels


def _rows(
    texts: list[tuple[str, ...]], tokenizer: Any, max_length: int
) -> list[tuple[list[int], int]]:
    """(token ids, how many of them are given and not learned); rows with nothing to learn go."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    learned = cut(tokenizer, [row[-1] for row in texts], max_length, special=False)
    prompts: list[list[int]] = [[]] * len(texts)
    if len(texts[0]) == 2:
        prompts = cut(tokenizer, [prompt for prompt, _ in texts], max_length, special=False)
    rows = []
    for prompt, text in zip(prompts, learned, strict=True):
        given = start + prompt
        ids = (given + text + end)[:max_length]
        given_count = max(len(given), 1)  # nothing comes before the first token
        if len(ids) > given_count:
            rows.append((ids, given_count))
    return rows
