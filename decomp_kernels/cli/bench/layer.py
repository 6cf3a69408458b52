"""``bench layer``: every method on one nn.Linear."""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

import torch

from decomp_kernels.bench import layer_tables, layers, record
from decomp_kernels.bench.shapes import positive, shape
from decomp_kernels.bench.tables import headline
from decomp_kernels.cli.bench.protocol import add_protocol, clock_of, protocol_of
from decomp_kernels.cli.errors import BadInput

SHAPES = [(512, 1024, 1024), (512, 2048, 2048)]
QUICK = [(64, 256, 256)]


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "layer",
        help="every method on one nn.Linear, next to PEFT",
        description="Overhead of each method over the frozen nn.Linear, forward + backward, in "
        "one interleaved run with an identical second frozen layer as control, next to PEFT's "
        "layer of the same method; peak memory, and bytes saved for backward.",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: the whole registry")
    parser.add_argument(
        "--shape", type=shape, action="append", metavar="M,K,N",
        help="tokens, in, out; may be repeated (default: 512 tokens at 1024 and 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=layers.DTYPES, default=["float32", "bfloat16"]
    )
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument(
        "--processes", type=positive, default=1,
        help="measure all in so many fresh processes, one after another: ratios move with a "
        "process and its heap, and the table then shows their range",
    )  # fmt: skip
    parser.add_argument("--bias", action="store_true", help="layers with a bias")
    parser.add_argument("--no-peer", action="store_true", help="leave out PEFT and the formulas")
    parser.add_argument(
        "--cold", action="store_true",
        help="time with flushed caches too; on a GPU these times are always there",
    )  # fmt: skip
    add_protocol(parser, rounds=25, quick_rounds=5)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    shapes = args.shape or (QUICK if args.quick else SHAPES)
    try:
        todo = list(layers.rows(args.methods, shapes, args.dtype, args.rank, args.bias))
    except ValueError as error:
        raise BadInput(str(error)) from None
    protocol = protocol_of(args) | {
        "processes": args.processes,
        "rank": args.rank,
        "peer": not args.no_peer,
        "cold": args.cold,
    }
    measured: list[dict[str, Any]] = []
    for process in range(args.processes):
        results = _here(todo, protocol) if args.processes == 1 else _apart(todo, protocol)
        for number, row in enumerate(results, start=1):
            measured.append(row | {"process": process})
            _progress(process, args.processes, number, len(todo), row)
    content = record.document("layer", protocol, measured)
    print(headline(content))
    print(layer_tables.table(measured))
    if args.output is not None:
        record.write(args.output, content)
        print(f"written: {args.output}")
    if args.picture is not None:
        layer_tables.picture(measured, args.picture, headline(content))
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
        clock=clock_of(protocol),
        peer=protocol["peer"],
        cold=protocol["cold"],
    )


def _progress(process: int, processes: int, number: int, total: int, row: dict[str, Any]) -> None:
    which = f"process {process + 1}/{processes}, " if processes > 1 else ""
    label, shape, dtype, ours, _, theirs = layer_tables.cells([row])[:6]
    print(
        f"{which}{number}/{total}  {label}  {shape} {dtype}: ours {ours}, peer {theirs}  "
        f"({row['seconds']:.1f} s)",
        file=sys.stderr,
        flush=True,
    )
