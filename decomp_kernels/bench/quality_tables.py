"""Tables and picture of the quality suite: what each method gained, and which differences stand.

    gain       mean over the seeds of (score - frozen model's), with Student's t interval (95 %)
    two apart  a paired t-test over the seeds of two methods: the same seed has the same batches
    tie        its p is above 0.05

The test rows are the same for all seeds: the spread is that of training, not that of other rows.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from decomp_kernels.bench.tables import MIB, Table, headline

LEVEL = 0.05
GROUPS = {"reconstruction": "Reconstruction", "extension": "Extension and combination"}
# RoBERTa-base, average of GLUE's eight development sets over five runs: arXiv:2407.05417, Tables
# II to IV; of LoRA and its kin at each of PAPER_RANKS.
PAPER = {"ssl": 82.51, "ia3": 83.91, "ssb": 84.72, "bitfit": 84.44}
PAPER_RANKS = (2, 4, 8, 16)
PAPER_LOW_RANK = {
    "lora": (86.14, 85.64, 86.12, 86.41),
    "lora+mpc_o": (86.18, 86.13, 86.71, 86.44),
    "lora+mpc_d": (86.13, 86.05, 86.34, 86.56),
    "lora+mpc_n": (86.20, 85.83, 86.02, 86.54),
    "trilora": (85.30, 85.89, 85.99, 86.40),
    "adalora": (86.20, 86.16, 85.99, 86.21),
    "flora": (86.21, 86.10, 86.37, 86.37),
    "dora": (86.12, 86.37, 86.56, 86.11),
}


def tables(content: dict[str, Any]) -> list[Table]:
    """A table for each group and budget, and one of the paper's ordering beside ours."""
    found = [_table(content, group) for group in groups(content)]
    beside = _beside_the_paper(content)
    return found + ([beside] if beside.lines else [])


Group = tuple[str, int | None]  # the kind, and LoRA's rank that it is matched to


def groups(content: dict[str, Any]) -> list[Group]:
    seen = {(row["group"], row.get("budget")): None for row in _runs(content)}
    order = list(GROUPS)
    return sorted(
        (group for group in seen if group[0] in GROUPS),
        key=lambda group: (order.index(group[0]), group[1] or 0),
    )


def ordered(content: dict[str, Any], group: Group) -> list[list[dict[str, Any]]]:
    """The runs of each method of a group, by seed; the best mean of the first metric first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _runs(content):
        if (row["group"], row.get("budget")) == group:
            found.setdefault(row["key"], []).append(row)
    methods = [sorted(rows, key=lambda row: row["seed"]) for rows in found.values()]
    first = content["protocol"]["metrics"][0]
    return sorted(methods, key=lambda rows: -statistics.mean(scores(rows, first)))


def scores(rows: Sequence[dict[str, Any]], metric: str) -> list[float]:
    return [row["scores"][metric] for row in rows]


def gains(content: dict[str, Any], rows: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Score less the frozen model's: of the same seed, where a head was trained on it."""
    frozen = {row["seed"]: row for row in _runs(content) if row["group"] == "frozen"}
    pairs = [(row, frozen.get(row["seed"], frozen.get(None))) for row in rows]
    return [row["scores"][metric] - base["scores"][metric] for row, base in pairs if base]


def _runs(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["kind"] == "run"]


def _table(content: dict[str, Any], group: Group) -> Table:
    metrics = content["protocol"]["metrics"]
    first = metrics[0]
    methods = ordered(content, group)
    timed = [row["contenders"] for row in content["rows"] if row["kind"] == "cost"]
    cost: dict[str, Any] = timed[0] if timed else {}
    header = ["", "method", "r", "per mille"]
    for metric in metrics:
        header.append(f"{metric}: mean ± std [min, max]")
    header += [f"gain in {first} [95 %]", "rate"]
    header += ["step x frozen [q1, q3]", "peak MiB"] if cost else []
    lines = []
    for place, rows in enumerate(methods, 1):
        row = rows[0]
        cells = [str(place), row["method"], str(row["r"] or "-"), f"{row['per_mille']:.2f}"]
        cells += [_spread(scores(rows, metric)) for metric in metrics]
        cells += [_interval(gains(content, rows, first)), _rate(content, rows)]
        if cost:
            cells += _cost(cost.get(row["key"]))
        lines.append(cells)
    frozen = next((row for row in _runs(content) if row["group"] == "frozen"), None)
    if frozen is not None:
        base = [row for row in _runs(content) if row["group"] == "frozen"]
        cells = ["", "frozen model", "-", "0"]
        cells += [_spread(scores(base, metric)) for metric in metrics] + ["", _rate(content, base)]
        if cost:
            cells += _cost(cost.get("control"))
        lines.append(cells)
    name = GROUPS[group[0]] + ("" if group[1] is None else f", matched to LoRA of rank {group[1]}")
    return Table(name, header, lines, _words(content, group, methods))


def _words(content: dict[str, Any], group: Group, methods: list[list[dict[str, Any]]]) -> str:
    """The ordering, which pairs are ties, and what the columns hide."""
    first = content["protocol"]["metrics"][0]
    order = " > ".join(rows[0]["method"] for rows in methods)
    words = [_setup(content["protocol"]), f"By mean {first}: {order}."]
    tests = comparisons(methods, first)
    if tests:
        seeds = min(len(rows) for rows in methods)
        ties: dict[str, list[str]] = {}
        for (better, worse), p in tests.items():
            if p > LEVEL:
                ties.setdefault(better, []).append(worse)
        tied = sum(map(len, ties.values()))
        held = sum(_holm(list(tests.values())))
        words.append(
            f"Of {len(tests)} pairs, {len(tests) - tied} differ (paired t-test over {seeds} "
            f"seeds, p <= {LEVEL}), {held} after Holm's correction for their number."
        )
        lists = "; ".join(f"{better} with {', '.join(others)}" for better, others in ties.items())
        words.append(f"Ties: {lists}." if ties else "No ties.")
    lora = next((rows[0] for rows in methods if rows[0]["method"] == "lora"), None)
    if lora is not None:
        off = [
            f"{rows[0]['method']} {100 * (rows[0]['trainable'] / lora['trainable'] - 1):+.0f} %"
            for rows in methods
            if abs(rows[0]["trainable"] / lora["trainable"] - 1) > 0.03
        ]
        if off:
            words.append(f"Parameters not within 3 % of LoRA's: {', '.join(off)}.")
    broken = [rows[0]["method"] for rows in methods if any(row.get("diverged") for row in rows)]
    if broken:
        words.append(f"The loss became no number in a run of {', '.join(broken)}.")
    if any(_at_the_edge(content, rows) for rows in methods):
        words.append("*: the best rate is at the edge of the grid, a wider one may do better.")
    return " ".join(filter(None, words))


def _setup(protocol: dict[str, Any]) -> str:
    """What was trained on what; empty for a file that does not say."""
    if "steps" not in protocol:
        return ""
    chosen = "the method's own rate"
    if protocol["lr_search"]:
        chosen = f"the best of {len(protocol['rates'])} rates on {protocol['validation']:,} others"
    return (
        f"{protocol['model']} on {protocol['data']}: {protocol['steps']:,} steps of "
        f"{protocol['batch_size']} of {protocol['train']:,} rows, {protocol['test']:,} test rows, "
        f"{chosen}."
    )


def comparisons(methods: list[list[dict[str, Any]]], metric: str) -> dict[tuple[str, str], float]:
    """{(better, worse): p of the paired t-test} of all pairs, over the seeds that both have."""
    found = {}
    for better, worse in combinations(methods, 2):
        other = {row["seed"]: row["scores"][metric] for row in worse}
        apart = [
            row["scores"][metric] - other[row["seed"]] for row in better if row["seed"] in other
        ]
        if len(apart) > 1:
            found[better[0]["method"], worse[0]["method"]] = paired_p(apart)
    return found


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that the mean of at least two differences is 0."""
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return two_sided(mean / deviation * math.sqrt(len(differences)), len(differences) - 1)


def two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's distribution, by its finite series for whole degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        n = 2 * k + (2 if odd else 1)
        term *= cosine * cosine * n / (n + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(|T| > t) = level, by halving."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return high


def _holm(ps: list[float]) -> list[bool]:
    """Which of these still hold when their number is allowed for."""
    held = [False] * len(ps)
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[index] > LEVEL / (len(ps) - rank):
            break
        held[index] = True
    return held


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} [{low:.3f}, {high:.3f}]"


def _interval(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.3f}"
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def _grid(content: dict[str, Any], key: str) -> list[float]:
    return [r["rate"] for r in content["rows"] if r["kind"] == "search" and r["key"] == key]


def _at_the_edge(content: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    grid = _grid(content, rows[0]["key"])
    return len(grid) > 1 and rows[0]["rate"] in (min(grid), max(grid))


def _rate(content: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if rows[0]["rate"] is None:
        return ""
    return f"{rows[0]['rate']:.3g}" + ("*" if _at_the_edge(content, rows) else "")


def _cost(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    ratio = found["ratio"]["both"]
    return [
        f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]",
        f"{found['peak_bytes'] / MIB:.0f}",
    ]


def _beside_the_paper(content: dict[str, Any]) -> Table:
    """Places here and in the paper, inside each group; the paper's at the same rank, or rank 8."""
    metric = content["protocol"]["metrics"][0]
    lines = []
    for group in groups(content):
        methods = [rows for rows in ordered(content, group) if _paper(rows[0]) is not None]
        if len(methods) < 2:
            continue
        averages = [_paper(rows[0]) or 0.0 for rows in methods]
        for place, (rows, average) in enumerate(zip(methods, averages, strict=True), 1):
            theirs = 1 + sum(other > average for other in averages)
            lines.append(
                [group[0], rows[0]["method"], str(place), str(theirs),
                 f"{statistics.mean(scores(rows, metric)):.3f}", f"{average:.2f}"]
            )  # fmt: skip
    return Table(
        "Beside the paper's ordering",
        ["group", "method", "place here", "place there", metric, "GLUE average there"],
        lines,
        "There: arXiv 2407.05417, Tables II to IV, RoBERTa-base, average of GLUE's eight "
        "development sets over five runs; LoRA and its kin at the same rank, else at rank 8. "
        "Another model and other tasks: only the ordering can be compared, and the paper's own "
        "differences inside the second group are of the size of its error bars.",
    )


def _paper(row: dict[str, Any]) -> float | None:
    if row["method"] in PAPER:
        return PAPER[row["method"]]
    if row["method"] not in PAPER_LOW_RANK:
        return None
    rank = row["budget"] if row["budget"] in PAPER_RANKS else 8
    return PAPER_LOW_RANK[row["method"]][PAPER_RANKS.index(rank)]


def picture(content: dict[str, Any], path: Path) -> None:
    """A dot for each seed, the mean as a bar across, and the frozen model as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = content["protocol"]["metrics"][0]
    panels = groups(content)
    longest = max((len(ordered(content, group)) for group in panels), default=1)
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(5.2 * max(1, len(panels)), 1.6 + 0.36 * longest),
        squeeze=False, sharex=True,
    )  # fmt: skip
    frozen = scores([row for row in _runs(content) if row["group"] == "frozen"], metric)
    for axis, group in zip(axes[0], panels, strict=False):
        methods = ordered(content, group)
        for height, rows in enumerate(methods):
            values = scores(rows, metric)
            axis.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.5, ms=5)
            mean = statistics.mean(values)
            axis.plot([mean, mean], [height - 0.3, height + 0.3], color="tab:blue", linewidth=2)
        if frozen:
            axis.axvline(statistics.mean(frozen), color="black", linewidth=0.8, linestyle="--")
        names = [f"{rows[0]['method']}  {rows[0]['per_mille']:.3g} ‰" for rows in methods]
        axis.set_yticks(range(len(methods)), names, fontsize=8)
        axis.invert_yaxis()
        budget = "" if group[1] is None else f", LoRA's budget at rank {group[1]}"
        axis.set_title(f"{GROUPS[group[0]]}{budget}", fontsize=9)
        axis.set_xlabel(f"{metric}: seeds, mean; dashed: frozen model", fontsize=8)
    figure.suptitle(headline(content), fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
