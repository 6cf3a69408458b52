"""Table of ``decomp-kernels tune``: in how many cells an implementation beats library calls."""

import statistics
from typing import Any

from decomp_kernels.bench.tables import Table

LIBRARY = "aten"
KINDS = ("dropout", "float32 adapters", "one dtype, no dropout", "no branch (SSB)")


def tables(content: dict[str, Any]) -> list[Table]:
    """Cells by kind: faster means that the quartiles of forward + backward lie apart."""
    cells: dict[tuple[str, str], list[tuple[dict[str, float], dict[str, float]]]] = {}
    for row in content["rows"]:
        if row["part"] != "implementations" or LIBRARY not in row["ratio"]:
            continue
        library = row["ratio"][LIBRARY]["both"]
        for impl, ratio in row["ratio"].items():
            if impl != LIBRARY:
                cells.setdefault((impl, _kind(row)), []).append((ratio["both"], library))
    order = sorted(cells, key=lambda name: (name[0], KINDS.index(name[1])))
    lines = []
    for impl, kind in order:
        pairs = cells[impl, kind]
        faster = sum(ours["q3"] < library["q1"] for ours, library in pairs)
        slower = sum(ours["q1"] > library["q3"] for ours, library in pairs)
        whole = statistics.median(library["median"] / ours["median"] for ours, library in pairs)
        lines.append((impl, kind, f"{len(pairs)}", f"{faster}", f"{slower}", f"{whole:.2f}"))
    header = ("implementation", "cells with", "cells", "faster", "slower", "library time over its")
    words = (
        "Forward + backward of one call of the operator. Faster and slower: the quartiles do not "
        "meet. The last column is the median over all cells of the kind."
    )
    return [Table("Implementations beside library calls", header, lines, words)]


def _kind(row: dict[str, Any]) -> str:
    if row["dropout"]:
        return KINDS[0]
    if row["wide_adapter"]:
        return KINDS[1]
    return KINDS[2] if row["r"] else KINDS[3]
