"""Tables of ``benchmarks/quantized_memory.py``: peak and time of a step on a quantised layer."""

from collections.abc import Callable
from typing import Any

from decomp_kernels.bench.tables import MIB, Table, spread_text


def tables(content: dict[str, Any]) -> list[Table]:
    """Peaks, times over the frozen layer of the same base, and what the tiles' size does."""
    rows = [row for row in content["rows"] if "layer" in row]
    tiles = [row for row in content["rows"] if "tile_elements" in row]
    M, K, N = content["protocol"]["shape"]
    words = (
        f"One layer of {K} x {N}, {M} tokens in {content['protocol']['dtype']}, r = "
        f"{content['protocol']['r']}, {content['protocol']['adapters']} adapters, forward and "
        "backward with the gradient of x. Peak of allocations, outputs and gradients included, "
        "weights and x not."
    )
    return [
        _crossed("peak MiB", rows, lambda row: f"{row['peak_bytes'] / MIB:.1f}", words),
        _crossed(
            "time over frozen",
            rows,
            lambda row: spread_text(row["over_frozen"]),
            "Over the frozen layer of the same base: median and quartiles of "
            f"{content['protocol']['rounds']} rounds.",
        ),
        Table(
            "Elements of a tile, on our frozen nf4 layer",
            ("elements", "peak MiB", "time over the size that is shipped"),
            [
                (
                    f"2^{row['tile_elements'].bit_length() - 1}",
                    f"{row['peak_bytes'] / MIB:.1f}",
                    spread_text(row["over_shipped"]),
                )
                for row in tiles
            ],
        ),
    ]


def _crossed(
    title: str, rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str], words: str
) -> Table:
    """Layers down, bases across; empty where nobody has that layer."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    found = {(row["layer"], row["base"]): cell(row) for row in rows}
    layers = dict.fromkeys(row["layer"] for row in rows)
    lines = [(layer, *(found.get((layer, base), "") for base in bases)) for layer in layers]
    return Table(title, (title, *bases), lines, words)
