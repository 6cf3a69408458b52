"""``decomp-kernels tune``: measure on this machine, and write the tables that ``auto`` reads."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from decomp_kernels import dispatch, native_library, tables
from decomp_kernels.bench import record, tiles, tune
from decomp_kernels.bench.tune import Cell
from decomp_kernels.cli.errors import BadInput

PARTS = ("tiles", "implementations")
QUICK_TOKENS, QUICK_RANKS = (16, 2048, 8192), (0, 16)
TILE_TOKENS, TILE_RANKS = (16, 2048, 8192), (16, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu", action="store_true",
        help="the native library beside library calls on the CPU, at the threads in use",
    )  # fmt: skip
    parser.add_argument("--part", choices=PARTS, action="append", help="default: both")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="M",
        help=f"default: {_words(tune.TOKENS)}; on a CPU {_words(tune.CPU_TOKENS)}",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, nargs="+", metavar="R",
        help=f"0 is a layer with scales alone (default: {_words(tune.RANKS)})",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few tokens, ranks and rounds")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of each part; what is not reached is left out"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--tables", type=Path, metavar="FOLDER", help=f"default: {tables.user_folder()}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="every ratio measured")
    parser.add_argument(
        "--dry", action="store_true",
        help="every step but the device's: tiny sizes in Triton's interpreter, and tables, marked "
        "as not measured, in a folder that is deleted",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    device = _device(args)
    arch = dispatch.architecture(device)
    if args.dry:
        _say("dry: interpreted on the CPU, so that every time and ratio here means nothing")
        with tempfile.TemporaryDirectory() as folder:
            return _run(args, device, arch, Path(folder), None)
    return _run(args, device, arch, args.tables or tables.user_folder(), tune.provenance(device))


def _run(
    args: argparse.Namespace,
    device: torch.device,
    arch: str,
    folder: Path,
    measured: dict[str, Any] | None,
) -> int:
    for place in (args.output, folder / "x.json"):
        if place is not None:
            record.check_place(place)  # before minutes of measuring
    parts = ["implementations"] if args.cpu else args.part or PARTS
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    if "tiles" in parts:
        found["tiles"] = _tiles(args, device, arch, folder, measured)
    if "implementations" in parts:
        found["implementations"] = _implementations(args, device, arch, folder, measured)
    if args.output is not None:
        protocol = {"rounds": args.rounds, "device": str(device), "dry": args.dry, "arch": arch}
        rows = [{"part": part} | row for part in PARTS for row in found[part]]
        record.write(args.output, record.document("tune", protocol, rows))
        print(f"written: {args.output}")
    return 0


def _tiles(args, device, arch, folder, measured) -> list[dict[str, Any]]:
    """Kernels one after another, each with its share of the time; each one's table when done."""
    start, names = time.monotonic(), list(tiles.kernels())
    found = []
    for number, kernel in enumerate(names, start=1):
        until = start + 60.0 * args.minutes * number / len(names)
        made = []
        cells = _tile_cells(args)
        if kernel in tiles.ON_WEIGHTS:
            cells = [cell for cell in cells if cell.M == cells[0].M]
        for cell in cells:
            if time.monotonic() >= until and not args.dry:
                _say(f"{kernel} {cell.label}: no time left")
                continue
            row = tiles.tune(kernel, cell, device, rounds=args.rounds, until=until)
            found.append(row)
            _say(f"{kernel} {cell.label}: {row['gain']:.2f} x, {row['tried']} tiles")
            if row["gain"] > 1.0:
                made.append(tiles.entry(row, arch, measured))
        if made:
            _written(args, tables.write(folder, kernel, made))
    return found


def _implementations(args, device, arch, folder, measured) -> list[dict[str, Any]]:
    until = time.monotonic() + 60.0 * args.minutes
    rows = []
    cells = _cells(args)
    if not cells:
        raise BadInput("no cell is left to measure: take fewer --tokens")
    for cell in cells:
        if time.monotonic() >= until:
            _say(f"{cell.label}: no time left")
            continue
        row = tune.measure(cell, device, rounds=args.rounds)
        rows.append(row)
        chosen = ", ".join(f"{d} {tune.fastest(row, d)}" for d in tune.DIRECTIONS)
        ratios = "  ".join(f"{i} {r['both']['median']:.3f}" for i, r in row["ratio"].items())
        _say(f"{cell.label}: {chosen}   ({ratios} x frozen)")
        for impl, why in row["failed"].items():
            if not args.cpu:  # where most are for GPUs
                _say(f"  {impl} failed: {why}")
    made = tune.entries(rows, arch, measured, one_call=args.cpu)
    made = tune.fewer(made) if args.cpu else made
    if made:
        _written(args, tables.write(folder, tables.IMPLEMENTATIONS, made))
        dispatch.measured_choice.cache_clear()
    return rows


def _cells(args: argparse.Namespace) -> list[Cell]:
    if args.dry:
        return [Cell(5, 20, 24, 0), Cell(5, 20, 24, 3, dropout=0.05, wide_adapter=True)]
    quick = args.quick
    if args.cpu:
        return list(
            tune.cells(
                args.tokens or (tune.CPU_TOKENS[2:3] if quick else tune.CPU_TOKENS),
                tune.CPU_LAYERS[1:3] if quick else tune.CPU_LAYERS,
                args.ranks or (tune.CPU_RANKS[:2] if quick else tune.CPU_RANKS),
                tune.CPU_DTYPES,
                scaled=(False, True),
                most=tune.CPU_MOST,
            )
        )
    return list(
        tune.cells(
            args.tokens or (QUICK_TOKENS if quick else tune.TOKENS),
            tune.LAYERS[:1] if quick else tune.LAYERS,
            args.ranks or (QUICK_RANKS if quick else tune.RANKS),
        )
    )


def _tile_cells(args: argparse.Namespace) -> list[Cell]:
    if args.dry:
        return [Cell(5, 20, 24, 3)]
    N, K = tune.LAYERS[0]
    tokens = args.tokens or TILE_TOKENS
    ranks = [r for r in args.ranks or TILE_RANKS if r]
    return [
        Cell(M, N, K, r, wide_adapter=wide)
        for M in sorted(tokens)
        for r in sorted(ranks[:1] if args.quick else ranks)
        for wide in (False, True)
    ]


def _device(args: argparse.Namespace) -> torch.device:
    if args.rounds < 1 or not 0 < args.minutes < 1e6:
        raise BadInput(
            f"--rounds and --minutes must be positive, got {args.rounds}, {args.minutes}"
        )
    if any(M < 1 for M in args.tokens or ()) or any(r < 0 for r in args.ranks or ()):
        raise BadInput("--tokens must be 1 or more and --ranks 0 or more")
    if args.cpu:
        if args.dry or args.part:
            raise BadInput("--cpu measures implementations on the CPU: leave --dry and --part out")
        if why := native_library.why_not_loaded():
            raise BadInput(f"tune --cpu needs the native library, and {why}")
        return torch.device("cpu")
    if why := dispatch.why_not_installed():
        raise BadInput(f"tune needs Triton, and {why}: pip install triton")
    if args.dry:
        os.environ[dispatch.INTERPRET] = "1"  # before the first import of triton
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(
            "tune needs a GPU that PyTorch sees; --cpu measures the CPU, and --dry tries "
            "every step without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _written(args: argparse.Namespace, path: Path) -> None:
    print(f"written: {path.name}, and deleted" if args.dry else f"written: {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
