"""Tables of ``decomp-kernels train``: what each method learnt, and what a step of it costs.

A row of the content's "compared" is a contender: seconds and ratios are (median, first quartile,
third quartile); "kind" says whose it is.  Of several methods each is followed by its peers.
"""

import math
from typing import Any

from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.tables import MIB, Table, spread_text

ACCELERATED = "PEFT, accelerate()"


def tables(content: dict[str, Any]) -> list[Table]:
    header, *lines = rows(content)
    rounds = content["options"]["rounds"]
    words = (
        f"{content['model']} on {content['data']['name']}, {content['data']['held_out']} held-out "
        "rows; gains with their 95 % bootstrap interval. A step is forward + backward; × are "
        f"medians of {rounds} interleaved rounds with quartiles."
    )
    shown = [Table("What each method learns and costs", header, lines, words)]
    accelerated = accelerate_lines(content)
    if accelerated:
        header = ["", "accelerated over PEFT", "accelerated over adapt", "peak MiB: PEFT, ours"]
        shown.append(
            Table("PEFT's own model after accelerate", header, accelerated, ran_fused(content))
        )
    return shown


def rows(content: dict[str, Any]) -> list[list[str]]:
    """Header and rows of text: the frozen model, and each method followed by its peer."""
    frozen, compared = content["frozen"], content["compared"]
    header = ["method", "trainable"]
    header += [f"{name}: before → after [gain, 95 %]" for name in frozen]
    language = "loss" in frozen
    header += ["perplexity"] if language else []
    header += ["step, s", "× frozen", "× ours", "peak MiB"] if compared else []
    empty = [""] * (len(header) - 2 - (4 if compared else 0))
    costs = {(row["label"], row["kind"]): row for row in compared}

    def cost(label: str, kind: str) -> list[str]:
        return _cost(costs[label, kind]) if compared else []

    before = [f"{value:.3f}" for value in frozen.values()]
    before += [_perplexity(frozen["loss"])] if language else []
    found = [header, ["frozen model", "0", *before, *cost(FROZEN, "frozen")]]
    if compared:
        found.append(["the same again (control)", "0", *empty, *cost(CONTROL, "frozen")])
    for result in content["methods"]:
        label, after = result["label"], result["after"]
        cells = [
            f"{frozen[name]:.3f} → {after[name]:.3f} [{low:+.3f}, {high:+.3f}]"
            for name, (_, low, high) in result["gains"].items()
        ]
        if language:
            cells.append(f"{_perplexity(frozen['loss'])} → {_perplexity(after['loss'])}")
        found.append([label, f"{result['trainable']:,}", *cells, *cost(label, "ours")])
        for row in compared:
            if row["label"] == label and row["kind"] != "ours":
                found.append([f"  {row['kind']}", f"{row['trainable']:,}", *empty, *_cost(row)])
    return found


def accelerate_lines(content: dict[str, Any]) -> list[list[str]]:
    """PEFT's model after ``accelerate`` over the same before, and over ours; no row, no line."""
    peaks = {
        row["label"]: row["peak_bytes"] for row in content["compared"] if row["kind"] == "PEFT"
    }
    return [
        [
            row["label"],
            spread_text(row["over_peft"]),
            spread_text(row["over_ours"]),
            f"{peaks[row['label']] / MIB:.0f}, {row['peak_bytes'] / MIB:.0f}",
        ]
        for row in content["compared"]
        if row["kind"] == ACCELERATED
    ]


def ran_fused(content: dict[str, Any]) -> str:
    """How many calls of accelerated layers ran on the operator."""
    counts = [row["fused"] for row in content["compared"] if row["kind"] == ACCELERATED]
    fused, calls = (sum(count[i] for count in counts) for i in (0, 1))
    return f"{fused:,} of {calls:,} calls of its layers ran on the operator."


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else f"e^{loss:.1f}"


def _cost(row: dict[str, Any]) -> list[str]:
    peak = row["peak_bytes"] / MIB
    return [
        f"{row['seconds'][0]:.3f}",
        "" if row["label"] == FROZEN else spread_text(row["over_frozen"]),
        "" if row["over_ours"] is None else spread_text(row["over_ours"]),
        f"{peak:.0f}" if peak >= 10 else f"{peak:.2f}",
    ]
