"""``bench table``: results files of the layer suite as one table, or goals next to results."""

import argparse
import json
from pathlib import Path
from typing import Any

from decomp_kernels.bench import layer_tables, record
from decomp_kernels.bench.marked import check_marked, put_into
from decomp_kernels.bench.tables import headline, texts
from decomp_kernels.cli.errors import BadInput


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "table",
        help="the table of layer results, or goals next to what was reached",
        description="Print results files of the layer suite as one Markdown table; with --goals, "
        "the goals next to what was reached.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--goals", type=Path, metavar="GOALS.json")
    parser.add_argument(
        "--into", type=Path, metavar="FILE.md",
        help="write the table into this file, between its <!-- goals --> or <!-- layers --> lines",
    )  # fmt: skip
    parser.add_argument("--phase", choices=("forward", "backward", "both"), default="both")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        contents = [record.read(path) for path in args.files]
        if args.into is not None:
            check_marked(args.into, "layers" if args.goals is None else "goals")
    except ValueError as error:
        raise BadInput(str(error)) from None
    rows = [row for content in contents for row in content["rows"]]
    if args.goals is None:
        name = "layers"
        table = texts(layer_tables.tables_of(rows, args.phase))
    else:
        goals = json.loads(args.goals.read_text())["goals"]
        name, table = "goals", layer_tables.against_goals(rows, goals)
    headlines = [headline(content) for content in contents]
    print("\n".join([*headlines, "", table]))
    if args.into is not None:
        put_into(args.into, name, "\n\n".join([*headlines, table]))
        print(f"written: {args.into}")
    if args.picture is not None:
        layer_tables.picture_of(rows, args.picture, headlines[0])
        print(f"written: {args.picture}")
    return 0
