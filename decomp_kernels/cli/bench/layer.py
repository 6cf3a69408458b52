"""``bench layer``: every method on one nn.Linear, beside PEFT's and the published formulas."""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

import torch

from decomp_kernels import dispatch
from decomp_kernels.bench import layer_tables, layers
from decomp_kernels.bench.shapes import positive, shape
from decomp_kernels.cli.bench.protocol import (
    add_protocol,
    check_memory,
    clock_of,
    device_of,
    finish,
    protocol_of,
)
from decomp_kernels.cli.bench.results import Results
from decomp_kernels.cli.errors import BadInput

SHAPES = [(512, 1024, 1024), (512, 2048, 2048)]
QUICK = [(64, 256, 256)]
SUITE = "layer"


def add(suites: Any) -> None:
    parser = suites.add_parser(
        SUITE,
        help="every method on one nn.Linear, beside PEFT's and the published formulas",
        description="Overhead of each method over the frozen nn.Linear, forward + backward, in "
        "one interleaved run with an identical second frozen layer as control: ours by every "
        "implementation, PEFT's layer with adapters of the same dtype, of its default float32, "
        "after accelerate() and compiled, and the formulas of methods that PEFT lacks; peak "
        "memory, bytes saved for backward, FLOPs and bytes, and the path that each took.",
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
        "--dropout", nargs="+", type=float, metavar="P",
        help="every method that has dropout with each of these (default: none, and the variants "
        "of LoRA and DoRA)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter-dtype", nargs="+", choices=layers.ADAPTER_DTYPES,
        help="base: the layer's own; every method with each of these (default: base, and the "
        "variants of LoRA and DoRA)",
    )  # fmt: skip
    parser.add_argument(
        "--bias", nargs="*", choices=("no", "yes"), default=["no"],
        help="layers with a bias; --bias no yes: both (default: no)",
    )  # fmt: skip
    parser.add_argument(
        "--impls", nargs="+", default=["all"], metavar="NAME",
        help="implementations of ours beside what auto takes: all that can run, auto for none, or "
        f"names ({', '.join(dispatch.IMPLS[1:])}; default: all but reference)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true",
        help="ours and PEFT's under torch.compile too: 10 to 30 seconds more a row",
    )  # fmt: skip
    parser.add_argument("--no-peer", action="store_true", help="leave out PEFT and the formulas")
    parser.add_argument(
        "--cold", action="store_true",
        help="time with flushed caches too; on a GPU these times are always there",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=positive, default=1,
        help="measure all in so many fresh processes, one after another: ratios move with a "
        "process and its heap, and the table then shows their range",
    )  # fmt: skip
    add_protocol(parser, rounds=25, quick_rounds=5)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    shapes = args.shape or (QUICK if args.quick else SHAPES)
    biases = [word == "yes" for word in args.bias or ["yes"]]
    try:
        todo = list(
            layers.rows(
                args.methods, shapes, args.dtype, args.rank, biases, args.dropout,
                args.adapter_dtype,
            )
        )  # fmt: skip
        todo = _fitting(todo, args.methods is not None)
    except ValueError as error:
        raise BadInput(str(error)) from None
    check_memory(max(map(layers.least_bytes, todo)), device_of(args))
    protocol = protocol_of(args) | {
        "processes": args.processes,
        "rank": args.rank,
        "peer": not args.no_peer,
        "impls": _impls(args),
        "compile": args.compile,
        "cold": args.cold,
    }
    results = Results(args, protocol)
    for process in range(args.processes):
        left = results.left(todo, process=process)
        measured = _here(left, protocol) if args.processes == 1 else _apart(left, protocol)
        for number, row in enumerate(measured, start=1):
            results.add(row | {"process": process})
            which = f"process {process + 1}/{args.processes}, " if args.processes > 1 else ""
            line = f"{which}{number}/{len(left)}  {layer_tables.progress(row)}"
            print(line, file=sys.stderr, flush=True)
    return finish(args, results.document(), layer_tables)


def _fitting(todo: list[layers.Row], named: bool) -> list[layers.Row]:
    """The rows whose method fits their layer; ValueError where one that was named does not."""
    fitting: list[layers.Row] = []
    told: dict[str, None] = {}
    for row in todo:
        try:
            layers.check(row)
        except ValueError as error:
            if named:
                raise
            told[f"left out: {error}"] = None
        else:
            fitting.append(row)
    if not fitting:
        raise ValueError(
            "there must be a row to measure, got none: --adapter-dtype float32 on a float32 layer "
            "is --adapter-dtype base, and every method must fit its layer"
        )
    print("".join(f"{line}\n" for line in told), end="", file=sys.stderr)
    return fitting


def _impls(args: argparse.Namespace) -> list[str]:
    """The implementations asked for; one that is named must run on this machine."""
    if args.impls == ["auto"]:
        return []
    if args.impls == ["all"]:
        return list(dispatch.CANDIDATES)
    for impl in args.impls:
        if impl == "auto" or impl not in dispatch.IMPLS:
            raise BadInput(
                f"--impls must be all, auto or names of {', '.join(dispatch.IMPLS[1:])}, "
                f"got {' '.join(args.impls)}"
            )
        tensors = [
            torch.empty(0, dtype=layers.DTYPES[dtype], device=args.device) for dtype in args.dtype
        ]
        reasons = [dispatch.why_not(tensor, impl) for tensor in tensors]
        if all(reasons):
            raise BadInput(
                f"--impls {impl} cannot run here: {reasons[0]}; leave it out, or say --impls all "
                "for those that can"
            )
    return list(args.impls)


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
        impls=protocol["impls"],
        others=protocol["peer"],
        compile_too=protocol["compile"],
        cold=protocol["cold"],
    )
