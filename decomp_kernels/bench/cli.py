"""``decomp-kernels bench``: measure layers, and make tables and pictures of results files."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.bench import layers, record, report
from decomp_kernels.bench.marked import check_marked, put_into
from decomp_kernels.bench.shapes import positive, shape

SHAPES = [(512, 1024, 1024), (512, 2048, 2048)]
QUICK = [(64, 256, 256)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", required=True)

    layer = suites.add_parser(
        "layer",
        help="every method on one nn.Linear, next to PEFT",
        description="Overhead of each method over the frozen nn.Linear, forward + backward, in "
        "one interleaved run with an identical second frozen layer as control, next to PEFT's "
        "layer of the same method; peak memory, and bytes saved for backward.",
    )
    layer.add_argument("--methods", nargs="+", metavar="NAME", help="default: the whole registry")
    layer.add_argument(
        "--shape", type=shape, action="append", metavar="M,K,N",
        help="tokens, in, out; may be repeated (default: 512 tokens at 1024 and 2048)",
    )  # fmt: skip
    layer.add_argument("--dtype", nargs="+", choices=layers.DTYPES, default=["float32", "bfloat16"])
    layer.add_argument("--rank", type=positive, default=16)
    layer.add_argument("--rounds", type=positive, help="default: 25, with --quick 5")
    layer.add_argument(
        "--processes", type=positive, default=1,
        help="measure all in so many fresh processes, one after another: ratios move with a "
        "process and its heap, and the table then shows their range",
    )  # fmt: skip
    layer.add_argument("--threads", type=positive, help="default: PyTorch's own choice")
    layer.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: the CPU time of the thread, with --threads 1: on a machine that others use too",
    )  # fmt: skip
    layer.add_argument("--device", default="cpu")
    layer.add_argument("--bias", action="store_true", help="layers with a bias")
    layer.add_argument("--no-peer", action="store_true", help="leave out PEFT and the formulas")
    layer.add_argument("--seed", type=int, default=0)
    layer.add_argument("--quick", action="store_true", help="a small shape and few rounds")
    layer.add_argument("--output", type=Path, metavar="FILE.json", help="samples and all the rest")
    layer.add_argument("--picture", type=Path, metavar="FILE.png")

    table = suites.add_parser(
        "table",
        help="the table of results files, or goals next to what was reached",
        description="Print results files as one Markdown table; with --goals, the goals next to "
        "what was reached.",
    )
    table.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    table.add_argument("--goals", type=Path, metavar="GOALS.json")
    table.add_argument(
        "--into", type=Path, metavar="FILE.md",
        help="write the table into this file, between its <!-- goals --> or <!-- layers --> lines",
    )  # fmt: skip
    table.add_argument("--phase", choices=("forward", "backward", "both"), default="both")
    table.add_argument("--picture", type=Path, metavar="FILE.png")


def run(args: argparse.Namespace) -> int:
    """The exit status.  Wrong options and files end in one line on stderr, before any work."""
    try:
        todo = _todo(args) if args.suite == "layer" else []
        if args.suite == "layer" and args.output is not None:
            record.check_place(args.output)
        contents = [record.read(path) for path in args.files] if args.suite == "table" else []
        if args.suite == "table" and args.into is not None:
            check_marked(args.into, "layers" if args.goals is None else "goals")
    except (OSError, ValueError) as error:
        print(f"decomp-kernels bench: error: {error}", file=sys.stderr)
        return 2
    return _layer(args, todo) if args.suite == "layer" else _table(args, contents)


def _todo(args: argparse.Namespace) -> list[layers.Row]:
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        raise ValueError(
            "--clock cpu is the CPU time of one thread: give --threads 1 and --device cpu with it, "
            f"got --threads {args.threads} and --device {args.device}"
        )
    if args.device != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"--device {args.device} needs a device that PyTorch sees; it sees none")
    shapes = args.shape or (QUICK if args.quick else SHAPES)
    return list(layers.rows(args.methods, shapes, args.dtype, args.rank, args.bias))


def _layer(args: argparse.Namespace, todo: list[layers.Row]) -> int:
    protocol = {
        "rounds": args.rounds or (5 if args.quick else 25),
        "warmup": 3,
        "processes": args.processes,
        "threads": args.threads or torch.get_num_threads(),
        "clock": args.clock,
        "device": args.device,
        "seed": args.seed,
        "rank": args.rank,
        "peer": not args.no_peer,
    }
    torch.set_num_threads(protocol["threads"])
    measured: list[dict[str, Any]] = []
    for process in range(args.processes):
        results = _here(todo, protocol) if args.processes == 1 else _apart(todo, protocol)
        for number, row in enumerate(results, start=1):
            measured.append(row | {"process": process})
            _progress(process, args.processes, number, len(todo), row)
    content = record.document("layer", protocol, measured)
    print(_headline(content))
    print(report.table(measured))
    if args.output is not None:
        record.write(args.output, content)
        print(f"written: {args.output}")
    if args.picture is not None:
        report.picture(measured, args.picture, _headline(content))
        print(f"written: {args.picture}")
    return 0


def _table(args: argparse.Namespace, contents: list[dict[str, Any]]) -> int:
    rows = [row for content in contents for row in content["rows"]]
    if args.goals is None:
        name, table = "layers", report.table(rows, args.phase)
    else:
        goals = json.loads(args.goals.read_text())["goals"]
        name, table = "goals", report.against_goals(rows, goals)
    headlines = [_headline(content) for content in contents]
    print("\n".join([*headlines, "", table]))
    if args.into is not None:
        put_into(args.into, name, "\n\n".join([*headlines, table]))
        print(f"written: {args.into}")
    if args.picture is not None:
        report.picture(rows, args.picture, headlines[0])
        print(f"written: {args.picture}")
    return 0


def _here(todo: list[layers.Row], protocol: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in todo:
        yield _measure((row, protocol))


def _apart(todo: list[layers.Row], protocol: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All rows in one fresh process: a new heap, newly chosen memory, newly cached primitives."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield from pool.imap(_measure, [(row, protocol) for row in todo])


def _measure(work: tuple[layers.Row, dict[str, Any]]) -> dict[str, Any]:
    row, protocol = work
    torch.set_num_threads(protocol["threads"])
    return layers.run(
        row,
        rounds=protocol["rounds"],
        warmup=protocol["warmup"],
        seed=protocol["seed"],
        device=torch.device(protocol["device"]),
        clock=time.thread_time_ns if protocol["clock"] == "cpu" else None,
        peer=protocol["peer"],
    )


def _progress(process: int, processes: int, number: int, total: int, row: dict[str, Any]) -> None:
    which = f"process {process + 1}/{processes}, " if processes > 1 else ""
    label, shape, dtype, ours, _, theirs = report.cells([row])[:6]
    print(
        f"{which}{number}/{total}  {label}  {shape} {dtype}: ours {ours}, peer {theirs}  "
        f"({row['seconds']:.1f} s)",
        file=sys.stderr,
        flush=True,
    )


def _headline(content: dict[str, Any]) -> str:
    machine, protocol, versions = content["machine"], content["protocol"], content["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions)
    where = machine["gpus"][0] if protocol["device"].startswith("cuda") else machine["cpu"]
    clock = "CPU time, " if protocol["clock"] == "cpu" else ""
    return (
        f"{where}, {protocol['threads']} threads, {clock}{protocol['rounds']} rounds x "
        f"{protocol['processes']} processes, {known}, commit {(content['commit'] or '?')[:12]}, "
        f"{content['date']}"
    )
