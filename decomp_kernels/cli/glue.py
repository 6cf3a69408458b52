"""GLUE's tasks (Wang et al. 2018, arXiv:1804.07461): classify a sentence or a pair, from files.

    loss    cross entropy of the head's logits; STS-B: mean squared error of its one output
    metric  accuracy; CoLA: Matthews' correlation; MRPC, QQP: accuracy and F1; STS-B: Pearson's and
            Spearman's correlation

A folder has the task's train and dev files as GLUE ships them (train.tsv, dev.tsv), or rows under
Hugging Face's column names (train.jsonl, validation.jsonl; .parquet where pandas can read it).
Learning rates and epochs are those of arXiv:2407.05417, Table VI; its batch is 32.
"""

import csv
import json
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.cli.datasets import SPLIT_SEED, Data
from decomp_kernels.cli.errors import BadInput, one_line
from decomp_kernels.cli.tasks import Scores, by_length, pad

ENTAILED = {"entailment": 0, "not_entailment": 1}


class GlueTask(NamedTuple):
    """tsv: the columns of texts and label in GLUE's file, by name, or by number without a header.
    columns: Hugging Face's.  words: labels that are words, in both.
    """

    name: str
    metrics: tuple[str, ...]
    rate: float
    epochs: int
    tsv: tuple[str | int, ...]
    columns: tuple[str, ...]
    outputs: int = 2  # of the head; 1 is a number to predict
    words: dict[str, int] = {}
    dev: tuple[str, ...] = ("dev", "validation")


_TASKS = (
    GlueTask(
        "mnli", ("accuracy",), 5e-4, 7, ("sentence1", "sentence2", "gold_label"),
        ("premise", "hypothesis", "label"), 3,
        {"entailment": 0, "neutral": 1, "contradiction": 2}, ("dev_matched", "validation_matched"),
    ),
    GlueTask("sst2", ("accuracy",), 8e-4, 24, ("sentence", "label"), ("sentence", "label")),
    GlueTask("cola", ("matthews",), 5e-4, 25, (3, 1), ("sentence", "label")),
    GlueTask(
        "qqp", ("accuracy", "f1"), 5e-4, 5, ("question1", "question2", "is_duplicate"),
        ("question1", "question2", "label"),
    ),
    GlueTask(
        "qnli", ("accuracy",), 1.2e-3, 5, ("question", "sentence", "label"),
        ("question", "sentence", "label"), words=ENTAILED,
    ),
    GlueTask(
        "rte", ("accuracy",), 1.2e-3, 50, ("sentence1", "sentence2", "label"),
        ("sentence1", "sentence2", "label"), words=ENTAILED,
    ),
    GlueTask(
        "mrpc", ("accuracy", "f1"), 1e-3, 30, ("#1 String", "#2 String", "Quality"),
        ("sentence1", "sentence2", "label"),
    ),
    GlueTask(
        "stsb", ("pearson", "spearman"), 2.2e-3, 25, ("sentence1", "sentence2", "score"),
        ("sentence1", "sentence2", "label"), 1,
    ),
)  # fmt: skip
GLUE = {task.name: task for task in _TASKS}


def read_glue(folder: Path, task: GlueTask) -> Data:
    """Training rows in random order, and development rows: (text, label) or (text, text, label),
    the label as text.
    """
    if not folder.is_dir():
        raise BadInput(
            f"--data must be the folder with {task.name}'s files, found none at {folder}"
        )
    train, held_out = _find(folder, ("train",)), _find(folder, task.dev)
    rows = _rows(train, task)
    rows = random.Random(SPLIT_SEED).sample(rows, len(rows))  # the first of them may validate
    return Data(rows, _rows(held_out, task), f"GLUE {task.name}")


class Glue:
    """train, held_out: (text, label) or (text, text, label) rows; texts cut to ``max_length``."""

    higher_is_better = True

    def __init__(
        self,
        task: GlueTask,
        train: list[tuple[str, ...]],
        held_out: list[tuple[str, ...]],
        tokenizer: Any,
        max_length: int,
    ) -> None:
        self.task, self.metrics, self.padding = task, task.metrics, tokenizer.pad_token_id
        self.texts, self.kinds = _cut(tokenizer, train, max_length)
        self.held_texts, self.held_kinds = _cut(tokenizer, held_out, max_length)
        kind = torch.float32 if task.outputs == 1 else torch.long
        self.labels = torch.tensor([float(row[-1]) for row in train]).to(kind)
        self.held_labels = torch.tensor([float(row[-1]) for row in held_out]).to(kind)
        self.size = len(train)

    def loss(self, model: nn.Module, rows: list[int]) -> Tensor:
        logits = self._logits(model, self.texts, self.kinds, rows)
        labels = self.labels[rows].to(logits.device)
        if self.task.outputs == 1:
            return F.mse_loss(logits[:, 0], labels)
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch_size: int) -> dict[str, Scores]:
        """Each metric of the held-out rows as one value: most are no mean over rows."""
        order = by_length(self.held_texts)
        found = torch.empty(len(order), self.task.outputs)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = self._logits(model, self.held_texts, self.held_kinds, rows).cpu()
        found = found.nan_to_num(0.0, 0.0, 0.0)  # of a run that diverged: it predicts nothing
        predicted = found[:, 0] if self.task.outputs == 1 else found.argmax(1)
        one = torch.ones(1, dtype=torch.float64)
        return {
            name: Scores(one * METRICS[name](predicted, self.held_labels), one)
            for name in self.metrics
        }

    @torch.no_grad()
    def outputs(self, model: nn.Module, count: int) -> Tensor:
        """The logits of the first held-out rows, [count, outputs]."""
        rows = list(range(min(count, len(self.held_texts))))
        return self._logits(model, self.held_texts, self.held_kinds, rows)

    def _logits(
        self, model: nn.Module, texts: list[list[int]], kinds: list[list[int]] | None,
        rows: list[int],
    ) -> Tensor:  # fmt: skip
        device = next(model.parameters()).device
        ids, mask = pad([texts[row] for row in rows], self.padding, device)
        more = {}
        if kinds is not None:
            more["token_type_ids"] = pad([kinds[row] for row in rows], 0, device)[0]
        return model(input_ids=ids, attention_mask=mask, **more).logits.float()


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The modules of a classifier that are not its pretrained body."""
    body = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, module in model.named_children()
        if name != body and any(True for _ in module.parameters())
    )


# Metrics: predictions and labels [rows], 0 where a denominator is 0.


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of label 1."""
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    named = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / named if named else 0.0


def pearson(predicted: Tensor, labels: Tensor) -> float:
    x, y = predicted.double(), labels.double()
    x, y = x - x.mean(), y - y.mean()
    size = (x.norm() * y.norm()).item()
    return (x @ y).item() / size if size else 0.0


def spearman(predicted: Tensor, labels: Tensor) -> float:
    return pearson(_ranks(predicted), _ranks(labels))


# Of two classes Matthews' correlation is Pearson's of the 0s and 1s.
METRICS = {
    "accuracy": accuracy, "f1": f1, "matthews": pearson, "pearson": pearson, "spearman": spearman
}  # fmt: skip


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order, equal values sharing the mean of theirs, float64 [rows]."""
    _, which, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.double().cumsum(0)
    return (last - (counts.double() - 1) / 2)[which]


def _cut(
    tokenizer: Any, rows: list[tuple[str, ...]], length: int
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of each row's texts together, and which text each is of where the model asks."""
    first = [row[0] for row in rows]
    second = [row[1] for row in rows] if len(rows[0]) == 3 else None
    made = tokenizer(first, second, truncation=True, max_length=length)
    return made["input_ids"], made.get("token_type_ids")


def _find(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        for path in sorted(folder.glob(f"{stem}*")):
            exact = path.stem == stem or path.stem.startswith(f"{stem}-")  # train-00000-of-00001
            if exact and path.suffix.lower() in _READERS:
                return path
    wanted = " or ".join(f"{stem}{suffix}" for stem in stems for suffix in _READERS)
    raise BadInput(f"{folder} must hold {wanted}; it has none of them")


def _rows(path: Path, task: GlueTask) -> list[tuple[str, ...]]:
    tsv = path.suffix.lower() == ".tsv"
    wanted = task.tsv if tsv else task.columns
    rows, short, line = [], 0, 0
    try:
        for line, row in _READERS[path.suffix.lower()](path, task):
            values = [row.get(column) for column in wanted]
            if any(value is None for value in values):
                if short == line - 1:  # the first one: it is the file, and not a broken line
                    missing = next(c for c, v in zip(wanted, values, strict=True) if v is None)
                    raise BadInput(
                        f"{path}, row {line}: {task.name} needs the columns "
                        f"{', '.join(map(repr, wanted))}; {missing!r} is missing"
                    )
                short += 1
                continue
            label = _label(values[-1], task, f"{path}, row {line}")
            if label is not None:
                rows.append((*map(str, values[:-1]), label))
    except (OSError, ValueError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {one_line(error)}") from None
    if short:
        print(f"note: {path}: {short} of {line} rows lack a column and are left out")
    if not rows:
        raise BadInput(f"{path} holds no labelled rows")
    return rows


def _label(value: Any, task: GlueTask, where: str) -> str | None:
    """The label as a number in text; None where the row has none (-1, and MNLI's "-")."""
    if isinstance(value, str) and value in task.words:
        return str(task.words[value])
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if task.outputs == 1 and 0.0 <= number <= 5.0:
        return str(number)
    if task.outputs > 1 and number in range(task.outputs):
        return str(int(number))
    if number == -1 or value == "-":
        return None
    allowed = [*task.words] or ["a number from 0 to 5"] * (task.outputs == 1) or ["0", "1"]
    raise BadInput(f"{where}: the label must be {' or '.join(allowed)}, got {value!r}")


def _tsv(path: Path, task: GlueTask) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if isinstance(task.tsv[0], int):
            for line, cells in enumerate(lines, 1):
                yield line, dict(enumerate(cells))
            return
        header = next(lines, [])
        for line, cells in enumerate(lines, 1):
            yield line, dict(zip(header, cells, strict=False))


def _jsonl(path: Path, task: GlueTask) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(filter(str.strip, file), 1):
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"row {line} must be a JSON object, got {text.strip()[:40]}")
            yield line, row


def _parquet(path: Path, task: GlueTask) -> Iterator[tuple[int, dict]]:
    try:
        frame = import_module("pandas").read_parquet(path)
    except ImportError:
        raise BadInput(
            f"{path} needs pandas and pyarrow: pip install pandas pyarrow, or give .jsonl"
        ) from None
    yield from enumerate(frame.to_dict("records"), 1)


_READERS = {".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
