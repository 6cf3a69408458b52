"""Table of ``benchmarks/accelerated_layers.py``: a PEFT layer after ``accelerate`` over before."""

from typing import Any

from decomp_kernels.bench.tables import Table, spread_text


def tables(content: dict[str, Any]) -> list[Table]:
    lines = [
        (
            f"{row['method']}, {row['base']}",
            f"{row['dropout']:g}",
            spread_text(row["accelerated_over_peft"]),
            spread_text(row["control_over_peft"]),
        )
        for row in content["rows"]
    ]
    M, K, N = content["protocol"]["shape"]
    words = (
        f"One layer of {K} x {N}, {M} tokens, r = {content['protocol']['r']}, "
        f"{content['protocol']['adapters']} adapters, forward and backward: median and quartiles "
        "of the ratio within a round. The control is a second copy of PEFT's layer over the first."
    )
    header = ("layer", "dropout", "accelerated over PEFT", "control")
    return [Table("PEFT layers under accelerate", header, lines, words)]
