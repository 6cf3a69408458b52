"""``bench report``: results files as one self-contained HTML page."""

import argparse
from pathlib import Path
from typing import Any

from decomp_kernels.bench import page, record, suites
from decomp_kernels.cli.errors import BadInput

DEFAULT = Path("benchmarks/results/cpu")


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "report",
        help="results files as one HTML page",
        description="Write results files of any suite as one self-contained HTML page: tables, "
        "pictures, machine and versions, and the command that measures each again. The page needs "
        "nothing else and no network.",
    )
    parser.add_argument(
        "places", nargs="*", type=Path, metavar="FOLDER_OR_FILE",
        help=f"files, or folders with *.json in them (default: {DEFAULT})",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.html", default=Path("report.html"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    paths = files(args.places or [DEFAULT])
    if args.output.resolve() in [path.resolve() for path in paths]:
        raise BadInput(
            f"--output must not be one of the results files, got {args.output}: name an .html file"
        )
    record.check_place(args.output)
    try:
        shown = [page.Shown(str(path), suites.read(path)) for path in paths]
        text = page.page(shown)
    except ValueError as error:
        raise BadInput(str(error)) from None
    args.output.write_text(text, encoding="utf-8")
    print(
        f"written: {args.output} ({len(shown)} results files, {len(text.encode()) / 2**10:.0f} KiB)"
    )
    return 0


def files(places: list[Path]) -> list[Path]:
    """The files named, and the *.json of the folders named, each once."""
    found: dict[Path, None] = {}
    for place in places:
        inside = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not inside:
            raise BadInput(f"{place} must have results files (*.json) in it, got none; name others")
        if not place.exists():
            raise BadInput(
                f"{place} must be a results file or a folder of them, got nothing there; write "
                "one with: decomp-kernels bench layer --output FILE"
            )
        found |= dict.fromkeys(inside)
    return list(found)
