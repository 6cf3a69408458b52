"""What a user gains, and where not: a step over the frozen layer, ours beside PEFT's.

Made of results files of the layer suite.  "PEFT / ours" is the time of PEFT's layer over ours in
the same round, median and quartiles over all rounds.  A row is a win (or a miss) where both
quartiles are above (below) 1, and neither where they are not.
Where PEFT lacks a method the peer is the formula of its authors, written plainly.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from decomp_kernels.bench import layer_tables
from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT_COMPILED
from decomp_kernels.bench.engine import FROZEN, Spread, spread
from decomp_kernels.bench.tables import MIB, SHORT, Table, counted

SHOWN = (  # the methods that most people train, and SSB, the paper's own: labels of rows
    "lora", "lora, dropout 0.05", "lora, fp32 adapters", "lora, fp32 adapters, dropout 0.05",
    "dora", "dora, dropout 0.05", "dora, fp32 adapters", "ssb", "ia3", "adalora", "vera", "oft",
    "oft, blocks of 32",
)  # fmt: skip
# What else PEFT has, in the table and not in the picture.
ALSO = ("boft", "hra", "loha", "lokr", "hira", "sparse", "pissa")
SAME = ("device", "threads", "clock", "processes", "compile")
SAME_MACHINE = ("cpu", "cores", "gpus")  # its clocks and its load are never the same twice
MORE_MEMORY = 1.05  # a peak this much above PEFT's is said


class Gain(NamedTuple):
    """One row: ratios to the frozen layer and peaks in MiB by contender; speed is PEFT / ours."""

    label: str
    shape: tuple[int, int, int]
    dtype: str
    ours: Spread
    peer: Spread
    compiled: Spread | None  # PEFT's layer under torch.compile
    speed: Spread
    peaks: dict[str, float]
    peer_is: str  # PEFT, or FORMULA
    row: dict[str, Any]


def gains(contents: Iterable[dict[str, Any]]) -> list[Gain]:
    """Every row that has a peer, in the order of the files."""
    rows = [row for content in contents for row in content["rows"]]
    groups = layer_tables.grouped(rows).values()
    return [_gain(group, name) for group in groups if (name := layer_tables.rival(group))]


def alike(contents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layer suite's file with most rows, and those measured in the same way on that machine.

    Ratios of one thread and of two are not put into one table.
    """
    found = [content for content in contents if content["suite"] == "layer"]
    found.sort(key=lambda content: -len(content["rows"]))
    how = [
        [
            *(content["machine"].get(name) for name in SAME_MACHINE),
            *(content["protocol"].get(name) for name in SAME),
        ]
        for content in found
    ]
    return [content for content, one in zip(found, how, strict=True) if one == how[0]]


def shown(found: Sequence[Gain], labels: Sequence[str] = SHOWN + ALSO) -> list[Gain]:
    """The rows of the headline table, at the largest shape, in bf16 where it was measured."""
    if not found:
        return []
    shape = max((gain.shape for gain in found), key=lambda s: (s[0] * s[1] * s[2], s))
    here = [gain for gain in found if gain.shape == shape and not gain.row["bias"]]
    wanted = "bfloat16" if any(gain.dtype == "bfloat16" for gain in here) else "float32"
    by_label = {gain.label: gain for gain in here if gain.dtype == wanted}
    return [by_label[label] for label in labels if label in by_label]


def table(found: Sequence[Gain]) -> Table:
    """The headline: times over the frozen layer, the peer's time over ours, peak memory."""
    compiled = any(gain.compiled for gain in found)
    header = ["method", "ours", "PEFT", *(["PEFT compiled"] if compiled else []), "PEFT / ours"]
    header += ["peak MiB: ours", "peak MiB: PEFT", "peak MiB: frozen"]
    lines = []
    for gain in found:
        cells = [gain.label, f"{gain.ours.median:.2f}"]
        cells.append(f"{gain.peer.median:.2f}" + ("" if gain.peer_is != FORMULA else " (formula)"))
        if compiled:
            cells.append("" if gain.compiled is None else f"{gain.compiled.median:.2f}")
        quartiles = f"[{gain.speed.q1:.2f}, {gain.speed.q3:.2f}]"
        speed = f"{gain.speed.median:.2f}"
        cells.append(f"**{speed}** {quartiles}" if gain.speed.q1 > 1 else f"{speed} {quartiles}")
        cells += [f"{gain.peaks[name]:.1f}" for name in (OURS, gain.peer_is, FROZEN)]
        lines.append(cells)
    words = ""
    if found:
        M, K, N = found[0].shape
        words = (
            f"One layer of {K} x {N} in {SHORT[found[0].dtype]}, {M} tokens: forward + backward "
            "over the frozen nn.Linear; PEFT / ours is the speed-up, median and quartiles within "
            f"rounds. Implementation of ours: {_paths(found)}."
        )
    return Table("What a step costs", header, lines, words)


def _paths(found: Iterable[Gain]) -> str:
    """What ours was seen to take, most rows first, each with its rows where they differ."""
    count = Counter(layer_tables.path_of(gain.row["contenders"][OURS]) for gain in found)
    if len(count) == 1:
        return next(iter(count))
    return ", ".join(f"{path} in {counted(n, 'row')}" for path, n in count.most_common())


def sides(found: Iterable[Gain]) -> tuple[list[Gain], list[Gain], list[Gain]]:
    """(wins, misses, neither): by both quartiles of PEFT / ours."""
    faster: list[Gain] = []
    slower: list[Gain] = []
    even: list[Gain] = []
    for gain in found:
        side = faster if gain.speed.q1 > 1 else slower if gain.speed.q3 < 1 else even
        side.append(gain)
    return faster, slower, even


def said(found: Sequence[Gain]) -> str:
    """Wins and misses in Markdown: how many rows there are of each, and every miss by name."""
    parts = []
    tokens = len({gain.shape[0] for gain in found}) > 1
    for whose, rows in (
        ("PEFT's layer", [gain for gain in found if gain.peer_is != FORMULA]),
        (
            "the authors' formula, for methods that PEFT lacks,",
            [g for g in found if g.peer_is == FORMULA],
        ),
    ):
        faster, slower, even = sides(rows)
        if rows:
            parts.append(
                f"Beside {whose} ours is faster in {len(faster)} of {len(rows)} measured rows and "
                f"slower in {len(slower)}; in {len(even)} the quartiles span 1."
            )
        if slower:
            slower.sort(key=lambda gain: gain.speed.median)
            listed = _listed(slower, tokens, lambda g: f"{g.ours.median:.2f} ({g.peer.median:.2f})")
            parts.append(f"**Slower**, over the frozen layer, theirs in brackets: {listed}.")
        larger = [
            gain for gain in rows if gain.peaks[OURS] > MORE_MEMORY * gain.peaks[gain.peer_is]
        ]
        if larger:
            larger.sort(key=lambda gain: gain.peaks[gain.peer_is] / gain.peaks[OURS])
            listed = _listed(
                larger, tokens, lambda g: f"{g.peaks[OURS]:.1f} ({g.peaks[g.peer_is]:.1f})"
            )
            parts.append(f"**More peak memory**, MiB: {listed}.")
    return "\n\n".join(parts)


def _listed(found: Sequence[Gain], tokens: bool, text: Callable[[Gain], str]) -> str:
    """By method: oft 2048 x 2048 bf16 1.62 (1.40), 1024 x 1024 bf16 1.72 (1.47); pissa ...

    ``tokens``: M x K x N.
    """
    methods: dict[str, list[str]] = {}
    for gain in found:
        M, K, N = gain.shape
        bias = ", bias" if gain.row["bias"] else ""
        where = f"{f'{M} x ' if tokens else ''}{K} x {N} {SHORT[gain.dtype]}{bias}"
        methods.setdefault(gain.label, []).append(f"{where} {text(gain)}")
    return "; ".join(f"{label} {', '.join(places)}" for label, places in methods.items())


def _gain(group: list[dict[str, Any]], peer: str) -> Gain:
    row = group[0]
    contenders = row["contenders"]
    M, K, N = row["shape"]
    speeds = [
        theirs / ours
        for one in group
        for theirs, ours in zip(
            one["contenders"][peer]["ns"]["both"],
            one["contenders"][OURS]["ns"]["both"],
            strict=True,
        )
    ]
    return Gain(
        label=row["label"],
        shape=(M, K, N),
        dtype=row["dtype"],
        ours=_over_frozen(group, OURS),
        peer=_over_frozen(group, peer),
        compiled=_over_frozen(group, PEFT_COMPILED) if PEFT_COMPILED in contenders else None,
        speed=spread(speeds),
        peaks={name: one["peak_bytes"] / MIB for name, one in contenders.items()},
        peer_is=peer,
        row=row,
    )


def _over_frozen(group: list[dict[str, Any]], name: str) -> Spread:
    """The median of the processes' medians, and their outermost quartiles."""
    low, high = layer_tables.quartiles(group, name)
    return Spread(statistics.median(layer_tables.medians(group, name)), low, high)
