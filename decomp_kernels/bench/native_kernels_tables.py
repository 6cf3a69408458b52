"""Tables of ``benchmarks/native_kernels.py``: library calls over the host kernels, time by time."""

import re
from collections.abc import Iterable
from typing import Any

from decomp_kernels.bench.tables import Table

Row = dict[str, Any]


def tables(content: dict[str, Any]) -> list[Table]:
    """Kernels on activations by dtypes, the others by size."""
    activations = [row for row in content["rows"] if row["shape"].startswith("512 x ")]
    weights = [row for row in content["rows"] if row not in activations]
    return [_by_dtype(activations), _by_size(weights)]


def _by_dtype(rows: list[Row]) -> Table:
    """512 x D r=R <dtypes>: one column a combination of dtypes, in a cell the sizes."""
    found: dict[str, dict[str, list[str]]] = {}
    sizes: dict[str, None] = {}
    dtypes: dict[str, None] = {}
    for row in rows:
        size, rank, dtype = re.findall(r"^512 x (\d+) r=(\d+) (.+)$", row["shape"])[0]
        sizes.setdefault(f"{size} at r = {rank}")
        dtypes.setdefault(dtype)
        found.setdefault(row["kernel"], {}).setdefault(dtype, []).append(
            f"{row['ratio']['median']:.2f}"
        )
    lines = [
        (kernel, *(" / ".join(cells.get(dtype, [])) for dtype in dtypes))
        for kernel, cells in found.items()
    ]
    words = f"Above 1 the kernel is faster. In a cell: {', '.join(sizes)}."
    return Table("Kernels on 512 tokens", ("kernel", *dtypes), lines, words)


def _by_size(rows: list[Row]) -> Table:
    """Ranges over all dtypes and ranks."""
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    lines = []
    for kernel in kernels:
        of = [row for row in rows if row["kernel"] == kernel]
        large = [row for row in of if row["shape"].startswith("4096")]
        small = [row for row in of if row not in large]
        lines.append((kernel, _range(small), _range(large), f"{len(of)}"))
    header = ("kernel", "1024 and 2048", "4096", "cells")
    words = (
        "From the least to the most, all dtypes. block_rotate and scatter, which OFT and sparse "
        "values are made of: 512 tokens."
    )
    return Table("Kernels on weights", header, lines, words)


def _range(rows: Iterable[Row]) -> str:
    found = [row["ratio"]["median"] for row in rows]
    return f"{min(found):.2f} to {max(found):.2f}" if found else ""
