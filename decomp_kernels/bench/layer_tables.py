"""Tables and pictures of the layer suite: overhead over the frozen layer, peak, bytes saved.

Rows of the same method, shape and dtypes from several processes or files are one line: the median
of the processes' medians, their range where there are several, and the outermost quartiles.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.layers import OURS, PEER
from decomp_kernels.bench.tables import MIB, SHORT, Table, markdown

Key = tuple[str, tuple[int, int, int], str, str, bool]
Group = list[dict[str, Any]]

HEADER = (
    "method", "M x K x N", "dtype", "ours", "[q1, q3]", "peer", "[q1, q3]", "control",
    "peak MiB ours/peer/frozen", "saved KiB ours/peer", "ms frozen", "path", "peer is",
)  # fmt: skip


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
    return [
        row["contenders"][name]["ratio"][phase]["median"]
        for row in group
        if name in row["contenders"]
    ]


def quartiles(group: Group, name: str, phase: str = "both") -> tuple[float, float]:
    found = [row["contenders"][name]["ratio"][phase] for row in group if name in row["contenders"]]
    return min(ratio["q1"] for ratio in found), max(ratio["q3"] for ratio in found)


def ratio_text(group: Group, name: str, phase: str = "both") -> str:
    """The median ratio, 1.06-1.08 where processes differ, - where there is none."""
    found = medians(group, name, phase)
    if not found:
        return "-"
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    return low if low == high else f"{low}-{high}"


def cells(group: Group, phase: str = "both") -> tuple[str, ...]:
    """One line of the table, as HEADER has it."""
    row = group[0]
    contenders = row["contenders"]
    M, K, N = row["shape"]

    def spread_text(name: str) -> str:
        if name not in contenders:
            return "-"
        q1, q3 = quartiles(group, name, phase)
        return f"[{q1:.2f}, {q3:.2f}]"

    def size(name: str, what: str, unit: int, digits: int) -> str:
        return f"{contenders[name][what] / unit:.{digits}f}" if name in contenders else "-"

    frozen_ns = [ns for row in group for ns in row["contenders"][FROZEN]["ns"][phase]]
    return (
        row["label"],
        f"{M} x {K} x {N}",
        SHORT[row["dtype"]],
        ratio_text(group, OURS, phase),
        spread_text(OURS),
        ratio_text(group, PEER, phase),
        spread_text(PEER),
        spread_text(CONTROL),
        "/".join(size(name, "peak_bytes", MIB, 1) for name in (OURS, PEER, FROZEN)),
        "/".join(size(name, "saved_bytes", 1024, 0) for name in (OURS, PEER)),
        f"{statistics.median(frozen_ns) / 1e6:.2f}",
        contenders[OURS]["path"],
        contenders[PEER]["path"] if PEER in contenders else "-",
    )


def table(rows: Iterable[dict[str, Any]], phase: str = "both") -> str:
    """The table as Markdown, padded so that it reads in a terminal too."""
    return markdown(HEADER, [cells(group, phase) for group in grouped(rows).values()])


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
        reached, peer, verdict, peak = "-", "-", "not measured", "-"
        if group is not None:
            reached, peer = ratio_text(group, OURS), ratio_text(group, PEER)
            noise = quartiles(group, CONTROL)[1] - 1.0
            ours = statistics.median(medians(group, OURS))
            verdict = "yes" if ours <= goal["goal"] + 0.005 else "no"
            if verdict == "no" and ours - max(noise, 0.0) <= goal["goal"] + 0.005:
                verdict = "noise"
            peak = cells(group)[HEADER.index("peak MiB ours/peer/frozen")]
        was = "-" if goal.get("peft") is None else f"{goal['peft']:.2f}"
        lines.append(
            (goal["label"], f"{K}", SHORT[goal["dtype"]], was, f"{goal['goal']:.2f}", reached,
             peer, verdict, peak)
        )  # fmt: skip
    return markdown(
        ("row", "d", "dtype", "PEFT then", "goal", "reached", "peer now", "reached?",
         "peak MiB ours/peer/frozen"),
        lines,
    )  # fmt: skip


def picture(rows: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the overhead over the frozen layer in percent, ours and the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[Group]] = {}
    for group in grouped(rows).values():
        M, K, N = group[0]["shape"]
        panels.setdefault((f"{M} x {K} x {N}", group[0]["dtype"]), []).append(group)
    longest = max(len(groups) for groups in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 1.2 + 0.34 * longest), squeeze=False
    )
    for axis, ((shape, dtype), groups) in zip(axes[0], panels.items(), strict=True):
        for offset, name, color in ((-0.2, OURS, "tab:blue"), (0.2, PEER, "tab:orange")):
            shown = [(i, group) for i, group in enumerate(groups) if medians(group, name)]
            middle = [100 * (statistics.median(medians(g, name)) - 1) for _, g in shown]
            spreads = [quartiles(group, name) for _, group in shown]
            errors = [
                [max(0.0, m - 100 * (q1 - 1)) for m, (q1, _) in zip(middle, spreads, strict=True)],
                [max(0.0, 100 * (q3 - 1) - m) for m, (_, q3) in zip(middle, spreads, strict=True)],
            ]
            axis.barh(
                [i + offset for i, _ in shown], middle, 0.38, xerr=errors, color=color,
                error_kw={"elinewidth": 0.8}, label="PEFT or formula" if name == PEER else name,
            )  # fmt: skip
        axis.set_yticks(range(len(groups)), [group[0]["label"] for group in groups], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.set_title(f"{shape}, {SHORT[dtype]}", fontsize=9)
        axis.set_xlabel("% over the frozen nn.Linear, forward + backward", fontsize=8)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def tables(content: dict[str, Any]) -> list[Table]:
    return [Table("Every method", HEADER, [cells(g) for g in grouped(content["rows"]).values()])]
