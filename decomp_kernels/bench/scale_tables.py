"""Tables and the picture of the scale suite: each size, and the exponents fitted over them.

A series is one method on one axis, its rows in the order of their sizes.  Two things are fitted:
the step itself, and what the adapter adds to the frozen stack, the median over rounds of ours less
frozen.  An addition below the noise (the upper quartile of |control - frozen|) is left out.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT
from decomp_kernels.bench.engine import CONTROL, FROZEN, spread
from decomp_kernels.bench.exponents import Fit, fit
from decomp_kernels.bench.ranks import ALONE
from decomp_kernels.bench.tables import MIB, SHORT, Table

Row = dict[str, Any]
Series = list[Row]
Value = Callable[[Row], float | None]

# Elements that autograd keeps for backward, by method: x and t = x A^T; z, which out_scale's
# gradient needs.  What is as small as N or K alone is left out.
SAVED: dict[str, Callable[[int, int, int, int], int]] = {
    "lora": lambda M, K, N, r: M * (K + r),
    "dora": lambda M, K, N, r: M * (K + r + N),
    "ssb": lambda M, K, N, r: M * (K + N),
}


def series(rows: Iterable[Row]) -> list[Series]:
    """The rows by axis and method, each in the order of its sizes."""
    found: dict[tuple[str, ...], Series] = {}
    for row in rows:
        found.setdefault((row["axis"], row["method"], row["dtype"]), []).append(row)
    return [sorted(group, key=lambda row: row["size"]) for group in found.values()]


def time_of(name: str) -> Value:
    """Median nanoseconds of a step."""
    return lambda row: statistics.median(row["contenders"][name]["ns"]["both"])


def added_time(name: str) -> Value:
    """Nanoseconds that ``name`` takes longer than the frozen stack; None below the noise."""

    def value(row: Row) -> float | None:
        ours, frozen, control = (
            row["contenders"][which]["ns"]["both"] for which in (name, FROZEN, CONTROL)
        )
        noise = spread([abs(a - b) for a, b in zip(control, frozen, strict=True)]).q3
        median = statistics.median([a - b for a, b in zip(ours, frozen, strict=True)])
        return median if median > noise else None

    return value


def held(name: str, what: str, less: str | None = None) -> Value:
    """Bytes by their key, less those of another contender; None where there are none."""

    def value(row: Row) -> float | None:
        found = row["contenders"]
        number = found[name][what] - (found[less][what] if less else 0)
        return number if number > 0 else None

    return value


def counted(what: str, added: bool = False) -> Value:
    """FLOPs or bytes of a step, as the roofline counts them; None where nothing is added."""

    def value(row: Row) -> float | None:
        work = row["work"]
        number = work[OURS][what] - (work[FROZEN][what] if added else 0)
        return number if number > 0 else None

    return value


def peer_of(row: Row) -> str:
    """Who is beside ours: PEFT's layers, or the formula of what PEFT lacks."""
    return FORMULA if FORMULA in row["contenders"] else PEFT


def fitted(group: Series, value: Value, name: str = OURS) -> tuple[Fit | None, int]:
    """The fit over the sizes that have a value, and how many of those measured do not."""
    there = [row for row in group if name in row["contenders"]]
    pairs = [(row["size"], found) for row in there if (found := value(row)) is not None]
    return fit([size for size, _ in pairs], [found for _, found in pairs]), len(there) - len(pairs)


def exponent(group: Series, value: Value, name: str = OURS, why: str = "noise") -> str:
    """0.98 ± 0.02, with how many sizes were left out; ``why`` where too few are left."""
    if not any(name in row["contenders"] for row in group):
        return "-"
    found, out = fitted(group, value, name)
    if found is None:
        return why
    text = f"{found.exponent:.2f}"
    if not math.isnan(found.error):
        text += f" ± {found.error:.2f}"
    return text + (f" ({found.sizes} of {found.sizes + out} sizes)" if out else "")


def tables(content: dict[str, Any]) -> list[Table]:
    """Exponents of time, exponents of memory, every size, and the processes where some ran."""
    groups = series(content["rows"])
    made = [_times(groups), _memory(groups), _sizes(groups)]
    parallel = [group for group in groups if group[0]["axis"] == "ranks"]
    return [*made, _ranks(parallel)] if parallel else made


def _name(group: Series) -> tuple[str, str, str]:
    first = group[0]
    sizes = [f"{row['size']}" for row in group]
    return first["axis"], first["method"], f"{sizes[0]} to {sizes[-1]}, {len(sizes)}"


def _by_work(group: Series, added: bool = False) -> str:
    """The exponents that the counted FLOPs and bytes have over the same sizes."""
    if group[0]["axis"] == "ranks":
        return "-" if added else exponent(group, lambda row: row["ideal"]).partition(" ")[0]
    texts = [exponent(group, counted(what, added), why="none") for what in ("flops", "bytes")]
    return " / ".join(text.partition(" ")[0] for text in texts)


def _times(groups: list[Series]) -> Table:
    header = (
        "axis", "method", "sizes", "frozen", "ours", "PEFT or formula", "by FLOPs / bytes",
        "ours adds", "theirs adds", "adds by FLOPs / bytes",
    )  # fmt: skip
    lines = []
    for group in groups:
        peer = peer_of(group[0])
        lines.append(
            (
                *_name(group),
                exponent(group, time_of(FROZEN), FROZEN),
                exponent(group, time_of(OURS)),
                exponent(group, time_of(peer), peer),
                _by_work(group),
                exponent(group, added_time(OURS)),
                exponent(group, added_time(peer), peer),
                _by_work(group, added=True),
            )
        )
    return Table(
        "Exponents of time",
        header,
        lines,
        "e in time ~ size^e, forward + backward, by least squares of log(time) on log(size), with "
        "its standard error. What an adapter adds is its median difference to the frozen stack in "
        "the same round; a size where that is within the noise is left out. Beside them the same "
        "fit of the FLOPs and of the bytes that a step is counted to have: time lies between, and "
        "below them while a step is fixed cost. Ranks: by the cores at hand.",
    )


def _memory(groups: list[Series]) -> Table:
    header = (
        "axis", "method", "sizes", "peak frozen", "peak ours", "peak theirs", "ours adds",
        "theirs adds", "saved ours", "saved theirs", "saved, by law",
    )  # fmt: skip
    lines = []
    for group in groups:
        of, peer = SAVED.get(group[0]["method"]), peer_of(group[0])

        def formula(row: Row, of=of) -> float | None:
            M, K, N = row["shape"]
            return row["layers"] * of(M, K, N, row["r"]) if of else None

        lines.append(
            (
                *_name(group),
                exponent(group, held(FROZEN, "peak_bytes"), FROZEN),
                exponent(group, held(OURS, "peak_bytes")),
                exponent(group, held(peer, "peak_bytes"), peer),
                exponent(group, held(OURS, "peak_bytes", FROZEN), why="none"),
                exponent(group, held(peer, "peak_bytes", FROZEN), peer, why="none"),
                exponent(group, held(OURS, "saved_bytes"), why="none"),
                exponent(group, held(peer, "saved_bytes"), peer, why="none"),
                exponent(group, formula, why="-").partition(" ")[0],
            )
        )
    return Table(
        "Exponents of memory",
        header,
        lines,
        "The same for bytes at the peak of a step (outputs, gradients, temporaries; weights and x "
        "not), what the adapter adds to the frozen stack's, and what is kept for backward: x and t "
        "= x A^T for LoRA, M (K + r) elements, and z [M, N] for DoRA; x and z for SSB. Bytes are "
        "counted, not timed: an error there is a sum of two laws, not noise.",
    )


def _sizes(groups: list[Series]) -> Table:
    header = (
        "axis", "method", "size", "M x K x N", "dtype", "ms frozen", "ms ours", "ours", "[q1, q3]",
        "theirs", "control", "peak MiB ours/theirs/frozen", "saved KiB ours/theirs", "path",
        "theirs is",
    )  # fmt: skip
    lines = []
    for row in (row for group in groups for row in group):
        found, peer = row["contenders"], peer_of(row)

        def ratio(name: str, found=found) -> str:
            return f"{found[name]['ratio']['both']['median']:.2f}" if name in found else "-"

        def spread_of(name: str, found=found) -> str:
            both = found[name]["ratio"]["both"]
            return f"[{both['q1']:.2f}, {both['q3']:.2f}]"

        def size(name: str, what: str, unit: int, digits: int, found=found) -> str:
            return f"{found[name][what] / unit:.{digits}f}" if name in found else "-"

        lines.append(
            (
                row["axis"],
                row["method"],
                f"{row['size']}",
                " x ".join(map(str, row["shape"])),
                SHORT[row["dtype"]],
                f"{statistics.median(found[FROZEN]['ns']['both']) / 1e6:.2f}",
                f"{statistics.median(found[OURS]['ns']['both']) / 1e6:.2f}",
                ratio(OURS),
                spread_of(OURS),
                ratio(peer),
                spread_of(CONTROL),
                "/".join(size(name, "peak_bytes", MIB, 2) for name in (OURS, peer, FROZEN)),
                "/".join(size(name, "saved_bytes", 1024, 0) for name in (OURS, peer)),
                found[OURS]["path"],
                found[peer]["path"] if peer in found else "-",
            )
        )
    return Table(
        "Every size",
        header,
        lines,
        "One step, forward + backward: times over the frozen stack's, as the median and quartiles "
        "of the rounds' ratios. Path: what the operator was seen to call in one step.",
    )


def _ranks(groups: list[Series]) -> Table:
    header = (
        "method", "ranks", "ms ours", "CPU ms a rank", "efficiency", "of the cores", "ours",
        "not reduced", "theirs", "control", "KiB reduced a step ours/theirs",
    )  # fmt: skip
    lines, fewer = [], ""
    for group in groups:
        one = next((row for row in group if row["ranks"] == 1), None)
        for row in group:
            found, peer = row["contenders"], peer_of(row)

            def ratio(name: str, found=found) -> str:
                return f"{found[name]['ratio']['both']['median']:.2f}" if name in found else "-"

            ns = statistics.median(found[OURS]["ns"]["both"])
            cpu = statistics.mean(statistics.median(times) for times in found[OURS]["cpu_ns"])
            efficiency = of_cores = "-"
            if one is not None:
                reached = statistics.median(one["contenders"][OURS]["ns"]["both"]) / ns
                efficiency = f"{reached:.0%}"
                of_cores = f"{reached * row['ideal'] / one['ideal']:.0%}"
            if row["ranks"] * row["threads"] > row["cores"]:
                fewer = (
                    f" This machine has {row['cores']} cores, fewer than the ranks' threads in "
                    "some rows: there the ranks share them, and a step cannot but take longer."
                )
            reduced = [
                f"{found[name]['reduced_bytes'] / 1024:.1f}" if name in found else "-"
                for name in (OURS, peer)
            ]
            lines.append(
                (
                    row["method"], f"{row['ranks']}", f"{ns / 1e6:.2f}", f"{cpu / 1e6:.2f}",
                    efficiency, of_cores, ratio(OURS), ratio(ALONE), ratio(peer), ratio(CONTROL),
                    "/".join(reduced),
                )
            )  # fmt: skip
    return Table(
        "Data parallel ranks",
        header,
        lines,
        "Processes with the same batch each, under DistributedDataParallel (gloo on CPUs, NCCL on "
        "GPUs); a step lasts until the slowest has done. Efficiency is the time of one rank over "
        "that of so many, of the cores the same where the ideal is what the cores allow. Not "
        "reduced: our stack without the wrapper. KiB: what each rank hands to the reduction, as "
        f"its hook sees it.{fewer}",
    )


def picture(content: dict[str, Any], path: Path) -> None:
    """A column of two log-log panels an axis, time above and peak below, with the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    from decomp_kernels.bench.tables import headline

    groups = series(content["rows"])
    axes_there = list(dict.fromkeys(group[0]["axis"] for group in groups))
    methods_there = list(dict.fromkeys(group[0]["method"] for group in groups))
    # Okabe and Ito's colours: told apart by everyone, and in print.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    colours = {name: palette[i % len(palette)] for i, name in enumerate(methods_there)}
    figure, panels = pyplot.subplots(
        2, len(axes_there), figsize=(max(6.4, 3.3 * len(axes_there)), 7.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    kinds: tuple[tuple[str, Callable[[str], Value], float], ...] = (
        ("ms a step", time_of, 1e6),
        ("peak MiB", lambda name: held(name, "peak_bytes"), MIB),
    )
    for column, axis in enumerate(axes_there):
        here = [group for group in groups if group[0]["axis"] == axis]
        for panel, (title, value, unit) in zip(panels[:, column], kinds, strict=True):
            for number, group in enumerate(here):
                colour = colours[group[0]["method"]]
                if number == 0:
                    _line(panel, group, value(FROZEN), FROZEN, unit, "#555555", "frozen", "s")
                _line(panel, group, value(OURS), OURS, unit, colour, group[0]["method"], "o")
                peer = peer_of(group[0])
                label = f"{group[0]['method']}, {peer}"
                _line(panel, group, value(peer), peer, unit, colour, label, "x")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel(axis)
            panel.set_ylabel(title)
            ticks = sorted({row["size"] for group in here for row in group})
            panel.set_xticks(ticks, [f"{tick}" for tick in ticks], fontsize=8)
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(
                    fontsize=7, frameon=False, ncols=2, loc="upper center",
                    bbox_to_anchor=(0.5, -0.16),
                )  # fmt: skip
    figure.suptitle(
        f"{headline(content)}\ndashed: the fitted power laws, with their exponents", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(
    panel: Any, group: Series, value: Value, name: str, unit: float, colour: str, label: str,
    marker: str,
) -> None:  # fmt: skip
    """The measured sizes as points and the fit as a dashed line, its exponent in the legend."""
    pairs = [
        (row["size"], found / unit)
        for row in group
        if name in row["contenders"] and (found := value(row)) is not None
    ]
    if not pairs:
        return
    sizes, values = zip(*pairs, strict=True)
    line = fit(sizes, values)
    if line is not None:
        label += f": {line.exponent:.2f}"
        ends = (min(sizes), max(sizes))
        panel.plot(
            ends, [line.at(size) for size in ends], linestyle="dashed", linewidth=1, color=colour,
            alpha=0.5 if marker == "x" else 1.0,
        )  # fmt: skip
    panel.plot(sizes, values, linestyle="none", marker=marker, markersize=4, color=colour,
               label=label)  # fmt: skip
