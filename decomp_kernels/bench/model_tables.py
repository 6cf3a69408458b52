"""Tables and pictures of the model suite: tokens per second, and what a step holds in memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from decomp_kernels.bench.contenders import (
    ACCELERATED,
    FORMULA,
    OURS,
    OURS_COMPILED,
    PEFT,
    PEFT_COMPILED,
)
from decomp_kernels.bench.decoder import FORMULA_COMPILED
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.tables import MIB, SHORT, Table, counted, headline

HEADER = (
    "method", "model", "tokens/s", "[q1, q3]", "x frozen", "[q1, q3]", "x peer", "[q1, q3]",
    "peak MiB", "saved MiB", "trainable", "path",
)  # fmt: skip
NAMES = {FROZEN: "frozen model", CONTROL: "the same again (control)"}
COLORS = {  # in the order in which they are shown
    FROZEN: "tab:gray", OURS: "tab:blue", OURS_COMPILED: "navy", PEFT: "tab:orange",
    FORMULA: "tab:red", ACCELERATED: "tab:cyan", PEFT_COMPILED: "tab:brown",
    FORMULA_COMPILED: "maroon",
}  # fmt: skip
WORDS = (
    "One training step: forward, backward down to the first block's input, AdamW on the adapters. "
    "x frozen and x peer are its time over that of the frozen model and of the peer (PEFT's model, "
    "or the formula of a method that PEFT lacks) in the same round: less is faster. Peak is what a "
    "step holds at most above its start, saved what is kept from forward to backward."
)

Key = tuple[str, str, str, str]


def tables(content: dict[str, Any]) -> list[Table]:
    """A table for each size, dtype and kind of checkpointing: a line for each model in each row."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault(key(row), []).append(row)
    made = [
        Table(", ".join(key), HEADER, [cells(row, name) for row in rows for name in shown(row)])
        for key, rows in groups.items()
    ]
    if made:
        made[0] = made[0]._replace(words=WORDS)
    absent = [
        (row["label"], SHORT[row["dtype"]], who, why)
        for row in content["rows"]
        for who, why in row["left_out"].items()
    ]
    if absent:
        made.append(Table("who is not beside ours", ("method", "dtype", "who", "why"), absent))
    return made


def key(row: dict[str, Any]) -> Key:
    """What a table's rows have in common, in words."""
    size = row["size"]
    adapters = "" if row["adapter_dtype"] == row["dtype"] else ", adapters in fp32"
    return (
        f"{counted(size['layers'], 'layer')} of {size['hidden']} and {size['intermediate']}",
        f"{row['parameters'] / 1e6:,.1f} M parameters",
        f"{size['batch']} x {size['sequence']} tokens",
        f"{SHORT[row['dtype']]}{adapters}, checkpointing {row['checkpointing']}",
    )


def shown(row: dict[str, Any]) -> Iterable[str]:
    """The row's contenders, in one order for all rows."""
    order = [FROZEN, CONTROL, *list(COLORS)[1:]]
    return sorted(row["contenders"], key=order.index)


def cells(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """One line, as HEADER has it."""
    got = row["contenders"][name]
    peer = got.get("over_peer") if name not in (FROZEN, CONTROL) else None
    rate = got["tokens_per_second"]
    return (
        row["label"],
        NAMES.get(name, name),
        f"{rate['median']:,.0f}",
        f"[{rate['q1']:,.0f}, {rate['q3']:,.0f}]",
        *_spread(got["ratio"]["both"] if name != FROZEN else None),
        *_spread(peer["both"] if peer and name != row["peer"] else None),
        f"{got['peak_bytes'] / MIB:,.1f}",
        f"{got['saved_bytes'] / MIB:,.1f}",
        f"{got['trainable']:,}",
        got["path"],
    )


def _spread(ratio: dict[str, float] | None) -> tuple[str, str]:
    if ratio is None:
        return "-", "-"
    return f"{ratio['median']:.2f}", f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]"


def progress(row: dict[str, Any]) -> str:
    """The row in a line: its models' times over the frozen one's."""
    times = "  ".join(
        f"{name} {row['contenders'][name]['ratio']['both']['median']:.2f}"
        for name in shown(row)
        if name != FROZEN
    )
    adapters = "" if row["adapter_dtype"] == row["dtype"] else ", fp32 adapters"
    what = f"{row['label']}, {SHORT[row['dtype']]}{adapters}, checkpointing {row['checkpointing']}"
    return f"{what}: x frozen: {times}"


def picture(content: dict[str, Any], path: Path) -> None:
    """Bars: tokens per second over the peer's on the left, peak memory of a step on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = content["rows"]
    bars = [(i, name) for i, row in enumerate(rows) for name in shown(row) if name in COLORS]
    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(11.0, 1.6 + 0.14 * len(bars) + 0.1 * len(rows)), sharey=True
    )
    places: dict[tuple[int, str], float] = {}
    ticks, labels, at = [], [], 0.0
    for i, row in enumerate(rows):
        mine = [name for j, name in bars if j == i]
        ticks.append(at + (len(mine) - 1) / 2)
        for name in mine:
            places[i, name] = at
            at += 1.0
        at += 0.8
        label = f"{row['label']}, {SHORT[row['dtype']]}"
        label += ", fp32 adapters" * (row["adapter_dtype"] != row["dtype"])
        labels.append(label + ", checkpointing" * (row["checkpointing"] != "none"))
    for i, name in bars:
        got, y, color = rows[i]["contenders"][name], places[i, name], COLORS[name]
        memory.barh(y, got["peak_bytes"] / MIB, 0.9, color=color)
        if "over_peer" in got:
            slower = got["over_peer"]["both"]
            middle, low, high = (1.0 / slower[k] for k in ("median", "q3", "q1"))
            error = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            speed.barh(y, middle, 0.9, xerr=error, color=color, error_kw={"elinewidth": 0.8})
    speed.set_yticks(ticks, labels, fontsize=8)
    speed.set_ylim(at, -1.0)  # downwards
    speed.axvline(1.0, color="black", linewidth=0.8)
    speed.set_xlabel("tokens per second over PEFT's (or the formula's): more is faster", fontsize=8)
    memory.set_xlabel("peak memory of a step, MiB", fontsize=8)
    seen = dict.fromkeys(name for name in COLORS for _, other in bars if name == other)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in seen]
    figure.legend(
        handles,
        [NAMES.get(name, name) for name in seen],
        loc="lower center",
        ncols=len(seen),
        fontsize=8,
    )
    figure.suptitle(headline(content), fontsize=8)
    figure.tight_layout(rect=(0.0, 0.4 / figure.get_figheight(), 1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
