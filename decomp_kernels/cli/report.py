"""What a job found: one table, its Markdown, metrics.json and the picture."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.bench import record, train_tables
from decomp_kernels.bench.tables import counted, spread_text
from decomp_kernels.bench.train_tables import ACCELERATED
from decomp_kernels.cli.checkpoint import write_bytes, write_json
from decomp_kernels.cli.checks import Agreement
from decomp_kernels.cli.compare import Compared
from decomp_kernels.cli.datasets import Data
from decomp_kernels.cli.loop import History
from decomp_kernels.cli.options import TrainOptions
from decomp_kernels.cli.picture import draw
from decomp_kernels.cli.tasks import Scores, Task
from decomp_kernels.cli.text import aligned

FORMAT = "decomp_kernels.train/1"


@dataclass
class Trained:
    """One method's results.  gains: (gain, low, high) of each metric, positive where better."""

    label: str
    method: dict[str, Any]
    lr: float
    trainable: int
    history: History
    after: dict[str, float]
    gains: dict[str, tuple[float, float, float]]
    agreement: Agreement


def write_all(
    output: Path,
    options: TrainOptions,
    model: str,
    data: Data,
    task: Task,
    before: dict[str, Scores],
    trained: list[Trained],
    compared: list[Compared],
    device: torch.device,
) -> None:
    """Print the table and write results.md, metrics.json and losses.png."""
    frozen = {name: scores.metric for name, scores in before.items()}
    notes = footnotes(options, trained, compared)
    machine, versions = record.machine(), record.versions()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
    content = record.document("train", options.as_json(), [])
    del content["rows"], content["protocol"]
    content |= {
        "format": FORMAT,
        "options": options.as_json(),
        "model": model,
        "data": {
            "name": data.name, "train": len(data.train), "held_out": len(data.held_out),
            "sha256": data.sha256,
        },
        "frozen": frozen,
        "methods": [asdict(result) for result in trained],
        "compared": [asdict(result) for result in compared],
    }  # fmt: skip
    rows = train_tables.rows(content)
    headline = (
        f"{model} on {data.name}; {where}, {counted(machine['threads'], 'thread')}, "
        f"torch {versions['torch']}"
    )
    print(f"\n{headline}\n\n{aligned(rows, numbers=True)}\n")
    for note in notes:
        print(note)
    text = "\n".join([headline, "", *markdown(rows), "", *(f"{note}  " for note in notes), ""])
    write_bytes(output / "results.md", text.encode())
    write_json(output / "metrics.json", content)
    picture = output / "losses.png"
    write_bytes(picture, draw(headline, task, frozen, trained))
    print(f"\nwritten: {output}/metrics.json, results.md, losses.png, adapters/")


def footnotes(options: TrainOptions, trained: list[Trained], compared: list[Compared]) -> list[str]:
    """How the numbers were taken, and what they say."""
    resampling = "paired bootstrap over the held-out rows, 10,000 resamples"
    notes = [f"Interval: {resampling}, 2.5 to 97.5 percentile of the gain."]
    unproven = [
        f"{result.label} ({name})"
        for result in trained
        for name, (_, low, _) in result.gains.items()
        if low <= 0
    ]
    if unproven:
        notes.append(f"No gain is shown where the interval reaches 0: {', '.join(unproven)}.")
    else:
        notes.append("Every gain over the frozen model is above 0, its whole interval too.")
    if compared:
        notes.append(
            f"Time: forward + backward of one training batch, median of {options.rounds} "
            "interleaved rounds in random order; × is the median ratio within a round, with its "
            "quartiles."
        )
        notes.append(
            "Peak: bytes allocated during one step, without weights (the profiler's allocator "
            "events on a CPU, the caching allocator's peak on a GPU)."
        )
        alone = {row.label for row in compared if row.kind == "ours"}
        alone -= {row.label for row in compared if row.kind not in ("ours", "frozen")}
        if alone:
            names = ", ".join(sorted(alone))
            notes.append(f"No peer (nobody has the method, or PEFT is not installed): {names}.")
        notes += _of_accelerated([row for row in compared if row.kind == ACCELERATED])
    seconds = [f"{r.label} {statistics.median(r.history.seconds):.2f} s" for r in trained]
    notes.append(f"Whole training steps, optimizer included, median: {', '.join(seconds)}.")
    return notes


def _of_accelerated(rows: list[Compared]) -> list[str]:
    """What ``accelerate`` changes for a model of PEFT's, and that it did."""
    if not rows:
        return []
    times = ", ".join(f"{r.label} {spread_text(r.over_peft)}" for r in rows if r.over_peft)
    fused, calls = (sum(r.fused[i] for r in rows if r.fused) for i in (0, 1))
    words = "accelerate(): PEFT's own model after decomp_kernels.accelerate(model); its time over"
    ran = f"{fused:,} of {calls:,} calls of its layers ran on the operator"
    return [f"{words} PEFT's: {times}; {ran}."]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return lines
