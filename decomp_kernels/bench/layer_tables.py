"""Tables and pictures of the layer suite: overhead over the frozen layer, peak, bytes saved.

Rows of the same method, shape and dtypes from several processes or files are one line: the median
of the processes' medians, their range where there are several, and the outermost quartiles.
"""

import math
import re
import statistics
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
    PEFT_WIDE,
)
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.observed import OPERATOR
from decomp_kernels.bench.peers_gpu import AXOLOTL, UNSLOTH
from decomp_kernels.bench.tables import MIB, SHORT, Table, headline, markdown
from decomp_kernels.dispatch import IMPLS

Key = tuple[str, tuple[int, int, int], str, str, bool]
Group = list[dict[str, Any]]

PEAK = "peak MiB ours/other/frozen"

# Who is shown beside ours, in this order, where anybody ran it.
OTHERS = {
    PEFT: "PEFT",
    PEFT_WIDE: "PEFT fp32",
    ACCELERATED: "accelerate()",
    PEFT_COMPILED: "PEFT compiled",
    FORMULA: "formula",
    OURS_COMPILED: "ours compiled",
    AXOLOTL: AXOLOTL,
    UNSLOTH: UNSLOTH,
}
RIVALS = (PEFT, FORMULA)  # the one beside ours where there is room for one

TIME_WORDS = (
    "Time of forward + backward over the frozen nn.Linear's in the same round: the median, and the "
    "range of the processes' medians where there are several. [q1, q3]: quartiles over the rounds. "
    "control: an identical second frozen layer. best other: ours by the fastest other "
    "implementation. PEFT: its layer with adapters of our dtype; PEFT fp32: with its default of "
    "float32; accelerate(): PEFT's layer on our operator; formula: the method as its paper's code "
    "has it, where PEFT lacks it. path: what ours was seen to take, and which other operators ran "
    "by kernels of ours. PEFT computes DoRA's norm in every step and drops x in its base product "
    "too, also where the row's ours does not."
)
# Where a file has them (bench/conditions.py), each in a table of its own.
CONDITIONS = {
    "cold both": "Every timed step after a flush of the caches.",
    "replay both": "Steps recorded in CUDA graphs and replayed: the device's time without the "
    "host's, where the frozen layer's is below 100 microseconds.",
    "cold replay both": "Replayed, after a flush of the caches.",
}
WORK_WORDS = (
    "Peak: bytes allocated at once during forward + backward, output and gradients included. "
    "Saved: bytes kept for backward beside weights. GFLOP and MB are counted, not measured: what "
    "ours and the frozen layer compute, and read and write at the least. Share of the roof: {roof}."
)


def tables(content: dict[str, Any], phase: str = "both") -> list[Table]:
    """Time; memory and work; and who is not in them, and why."""
    return tables_of(content["rows"], phase)


def tables_of(rows: Iterable[dict[str, Any]], phase: str = "both") -> list[Table]:
    """``tables`` of the rows of one or more results files."""
    groups = list(grouped(rows).values())
    roofs = dict.fromkeys(group[0]["roof"]["what"] for group in groups)
    found = [Table(f"Layers: time, {phase}", *_time(groups, phase), TIME_WORDS)]
    for condition, words in CONDITIONS.items():
        having = [group for group in groups if medians(group, FROZEN, condition)]
        if having:
            title = f"Layers: time, {condition}"
            found.append(Table(title, *_time(having, condition), words))
    words = WORK_WORDS.format(roof="; ".join(roofs))
    found.append(Table("Layers: memory and work", *_work(groups), words))
    absent = _absent(groups)
    if absent:
        found.append(
            Table("Layers: who is not beside ours, and why", ("who", "method", "why"), absent)
        )
    return found


def _time(groups: list[Group], phase: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    shown = [name for name in OTHERS if any(medians(group, name, phase) for group in groups)]
    impls = any(best_impl(group, phase) for group in groups)
    header = (
        "method", "M x K x N", "dtype", OURS, "[q1, q3]", *(["best other"] if impls else []),
        *(OTHERS[name] for name in shown), CONTROL, "ms frozen", "path",
    )  # fmt: skip
    lines = []
    for group in groups:
        frozen = [row["contenders"][FROZEN]["ns"].get(phase, []) for row in group]
        frozen_ns = [ns for each in frozen for ns in each]
        best = best_impl(group, phase)
        other = f"{ratio_text(group, best, phase)} {best}" if best else "-"
        lines.append(
            (*_which(group), ratio_text(group, OURS, phase), spread_text(group, OURS, phase),
             *([other] if impls else []),
             *(ratio_text(group, name, phase) for name in shown),
             spread_text(group, CONTROL, phase), f"{statistics.median(frozen_ns) / 1e6:.2f}",
             _paths(group))
        )  # fmt: skip
    return header, lines


def _work(groups: list[Group]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = (
        "method", "M x K x N", "dtype", "trained", PEAK, "saved KiB ours/other",
        "other is", "GFLOP ours/frozen", "MB ours/frozen", "share of roof",
    )  # fmt: skip
    lines = []
    for group in groups:
        row = group[0]
        names = OURS, rival(group), FROZEN
        work = row["work"]
        share = statistics.median(row["roof"]["share"]["both"]["median"] for row in group)
        lines.append(
            (*_which(group), f"{row['contenders'][OURS]['trainable']:,}", peaks(group),
             "/".join(_size(row, name, "saved_bytes", 1024, 0) for name in names[:2]),
             row["contenders"][names[1]]["path"] if names[1] else "-",
             *("/".join(f"{work[name][what]['both'] / unit:.2f}" for name in (OURS, FROZEN))
               for what, unit in (("flops", 1e9), ("bytes", 1e6))),
             f"{100 * share:.0f} %")
        )  # fmt: skip
    return header, lines


def _absent(groups: list[Group]) -> list[tuple[str, str, str]]:
    """Others than implementations that a method lacks though they were asked for."""
    found: dict[tuple[str, str, str], None] = {}
    for group in groups:
        row = group[0]
        for name, why in row["left_out"].items():
            lacks = rival(group) is None or name not in (PEFT, FORMULA)
            if name in OTHERS and lacks:
                found[OTHERS[name], row["label"], why] = None
    return list(found)


def grouped(rows: Iterable[dict[str, Any]]) -> dict[Key, Group]:
    """Rows by what they measure, in the order in which they were first met."""
    groups: dict[Key, Group] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def key(row: dict[str, Any]) -> Key:
    M, K, N = row["shape"]
    return row["label"], (M, K, N), row["dtype"], row["adapter_dtype"], row["bias"]


def medians(group: Group, name: str, phase: str = "both") -> list[float]:
    """The median ratio of each process; empty where the contender did not run."""
    return [ratio["median"] for ratio in _ratios(group, name, phase)]


def quartiles(group: Group, name: str, phase: str = "both") -> tuple[float, float]:
    found = _ratios(group, name, phase)
    return min(ratio["q1"] for ratio in found), max(ratio["q3"] for ratio in found)


def _ratios(group: Group, name: str, phase: str) -> list[dict[str, float]]:
    """Of the rows where the contender was timed so: not every one is in every phase."""
    found = (row["contenders"].get(name, {"ratio": {}})["ratio"] for row in group)
    return [ratio[phase] for ratio in found if phase in ratio]


def ratio_text(group: Group, name: str, phase: str = "both") -> str:
    """The median ratio, 1.06-1.08 where processes differ, - where there is none."""
    found = medians(group, name, phase)
    if not found:
        return "-"
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    return low if low == high else f"{low}-{high}"


def spread_text(group: Group, name: str, phase: str = "both") -> str:
    if not medians(group, name, phase):
        return "-"
    q1, q3 = quartiles(group, name, phase)
    return f"[{q1:.2f}, {q3:.2f}]"


def rival(group: Group) -> str | None:
    """PEFT where it has the method, else the formula; None where there is neither."""
    return next((name for name in RIVALS if name in group[0]["contenders"]), None)


def best_impl(group: Group, phase: str = "both") -> str | None:
    """The fastest implementation of ours beside what auto takes."""
    contenders = group[0]["contenders"]
    named = [name for name in contenders if name in IMPLS and medians(group, name, phase)]
    return min(named, key=lambda name: statistics.median(medians(group, name, phase)), default=None)


def peaks(group: Group) -> str:
    """Peak MiB of ours, of the one beside it and of the frozen layer."""
    names = OURS, rival(group), FROZEN
    return "/".join(_size(group[0], name, "peak_bytes", MIB, 1) for name in names)


def _size(row: dict[str, Any], name: str | None, what: str, unit: int, digits: int) -> str:
    return "-" if name is None else f"{row['contenders'][name][what] / unit:.{digits}f}"


def _which(group: Group) -> tuple[str, str, str]:
    label, (M, K, N), dtype, *_ = key(group[0])
    return label, f"{M} x {K} x {N}", SHORT[dtype]


def _paths(group: Group) -> str:
    """What ours took: every way that a process took."""
    return " or ".join(dict.fromkeys(path_of(row["contenders"][OURS]) for row in group))


def path_of(ours: dict[str, Any]) -> str:
    """The linear's way, and which other operators ran by kernels of ours."""
    calls = [re.match(r"(\w+) \w+: (\w+)", line) for line in ours["calls"]]
    others = dict.fromkeys(
        f"{call[1]} {call[2]}"
        for call in calls
        if call and call[1] != OPERATOR and call[2] in ("native", "triton")
    )
    return " + ".join([ours["path"], *others])


def progress(row: dict[str, Any]) -> str:
    """One line on a row that is done."""
    group = [row]
    label, shape, dtype = _which(group)
    shown = {OURS: OURS} | {n: word for n, word in OTHERS.items() if n in row["contenders"]}
    ratios = ", ".join(f"{word} {ratio_text(group, name)}" for name, word in shown.items())
    return f"{label}  {shape} {dtype}: {ratios}  ({row['seconds']:.1f} s)"


def against_goals(rows: Iterable[dict[str, Any]], goals: list[dict[str, Any]]) -> str:
    """Goals next to what was reached: a goal is a row's identity, "goal", and PEFT's then.

    A goal is reached where our median is at most the goal; a result within the control's upper
    quartile of it is written "noise", since an identical layer would be there too.
    """
    groups = grouped(rows)
    lines: list[tuple[str, ...]] = []
    for goal in goals:
        M, K, N = goal["shape"]
        name = goal["label"], (M, K, N), goal["dtype"], goal["adapter_dtype"], False
        group = groups.get(name)
        reached, other, verdict, peak = "-", "-", "not measured", "-"
        if group is not None:
            beside = rival(group)
            reached = ratio_text(group, OURS)
            other = "-" if beside is None else ratio_text(group, beside)
            noise = quartiles(group, CONTROL)[1] - 1.0
            ours = statistics.median(medians(group, OURS))
            verdict = "yes" if ours <= goal["goal"] + 0.005 else "no"
            if verdict == "no" and ours - max(noise, 0.0) <= goal["goal"] + 0.005:
                verdict = "noise"
            peak = peaks(group)
        was = "-" if goal.get("peft") is None else f"{goal['peft']:.2f}"
        lines.append(
            (goal["label"], f"{K}", SHORT[goal["dtype"]], was, f"{goal['goal']:.2f}", reached,
             other, verdict, peak)
        )  # fmt: skip
    return markdown(
        ("row", "d", "dtype", "PEFT then", "goal", "reached", "other now", "reached?", PEAK),
        lines,
    )  # fmt: skip


def picture(content: dict[str, Any], path: Path) -> None:
    """Bars of the overhead over the frozen layer in percent, a panel for each shape and dtype."""
    picture_of(content["rows"], path, headline(content))


def picture_of(rows: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    """``picture`` of the rows of one or more results files; bars are cut where twice as long as
    the longest of ours, and say how long they are.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Group]] = {}
    for group in grouped(rows).values():
        M, K, N = group[0]["shape"]
        panels.setdefault((f"{M} x {K} x {N}", group[0]["dtype"]), []).append(group)
    longest = max(len(groups) for groups in panels.values())
    across = min(len(panels), 2)  # readable where a page is as wide as two panels
    lines = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(
        lines, across, figsize=(4.9 * across, (1.4 + 0.36 * longest) * lines), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((shape, dtype), groups) in zip(axes.flat, panels.items(), strict=False):
        limit = 2 * max(100 * (max(medians(group, OURS)) - 1) for group in groups)
        limit = max(limit, 20.0)
        kinds = (
            (OURS, lambda group: OURS, "tab:blue"),
            ("PEFT or formula", rival, "tab:orange"),
            (ACCELERATED, lambda group: ACCELERATED, "tab:green"),
        )
        reach = 0.0  # the end of the longest bar or quartile
        for place, (label, who, color) in enumerate(kinds):
            bars = [
                (i + 0.27 * (place - 1), *_percent(group, name))
                for i, group in enumerate(groups)
                if (name := who(group)) is not None and medians(group, name)
            ]
            if not bars:
                continue
            spots, middle, low, high = zip(*bars, strict=True)
            cut = [min(value, limit) for value in middle]
            reach = max(reach, min(max(high), limit))
            errors = [
                [max(0.0, m - q) for m, q in zip(middle, low, strict=True)],
                [max(0.0, q - m) if q < limit else 0.0 for m, q in zip(middle, high, strict=True)],
            ]
            axis.barh(
                spots, cut, 0.25, xerr=errors, color=color, error_kw={"elinewidth": 0.7},
                label=label,
            )  # fmt: skip
            for spot, value in zip(spots, middle, strict=True):
                if value > limit:
                    axis.text(limit, spot, f" {value:.0f} %", va="center", fontsize=6)
        axis.set_xlim(right=1.15 * max(reach, 1.0))
        axis.set_yticks(range(len(groups)), [group[0]["label"] for group in groups], fontsize=8)
        axis.set_ylim(len(groups) - 0.4, -0.6)
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_title(f"{shape}, {SHORT[dtype]}", fontsize=9)
        axis.set_xlabel("% over the frozen nn.Linear", fontsize=8)
        axis.legend(fontsize=7)
    height = figure.get_size_inches()[1]
    figure.suptitle(title, fontsize=9, y=1 - 0.1 / height, va="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _percent(group: Group, name: str) -> tuple[float, float, float]:
    """Median and quartiles of the overhead over the frozen layer, in percent."""
    q1, q3 = quartiles(group, name)
    middle = statistics.median(medians(group, name))
    return 100 * (middle - 1), 100 * (q1 - 1), 100 * (q3 - 1)
