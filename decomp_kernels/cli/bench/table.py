"""``bench table``: results files of the layer suite as one table, or goals next to results."""

import argparse
import json
from pathlib import Path
from typing import Any

from decomp_kernels.bench import layer_tables, record, suites
from decomp_kernels.bench.tables import headline, texts
from decomp_kernels.cli.errors import BadInput


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "table",
        help="the table of layer results, or goals next to what was reached",
        description="Print results files of the layer suite as one Markdown table; with --goals, "
        "the goals next to what was reached.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--goals", type=Path, metavar="GOALS.json")
    parser.add_argument("--phase", choices=("forward", "backward", "both"), default="both")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        contents = [record.read(path, "layer") for path in args.files]
        rows = [row for content in contents for row in content["rows"]]
        for content in contents:
            suites.tables(content)  # they are those of the suite
        headlines = [_headline(path, one) for path, one in zip(args.files, contents, strict=True)]
        goals = None if args.goals is None else _goals(args.goals, rows)
    except ValueError as error:
        raise BadInput(str(error)) from None
    table = texts(layer_tables.tables_of(rows, args.phase)) if goals is None else goals
    print("\n".join([*headlines, "", table]))
    if args.picture is not None:
        layer_tables.picture_of(rows, args.picture, headlines[0])
        print(f"written: {args.picture}")
    return 0


def _headline(path: Path, content: dict[str, Any]) -> str:
    try:
        return headline(content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must say its machine, threads and rounds as bench layer does, got "
            f"{type(error).__name__}: {error}; measure again"
        ) from error


def _goals(path: Path, rows: list[dict[str, Any]]) -> str:
    """The table of goals; ValueError where the file has none."""
    try:
        return layer_tables.against_goals(rows, json.loads(path.read_text("utf-8"))["goals"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} must be a JSON object of "goals", each with label, shape, dtype, '
            f"adapter_dtype and goal, got {type(error).__name__}: {error}"
        ) from error
