"""``bench scale``: how time and memory grow, one size at a time."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from decomp_kernels.bench import growth, ranks, scale_tables
from decomp_kernels.bench.contenders import OURS
from decomp_kernels.bench.engine import FROZEN
from decomp_kernels.bench.growth import AXES, Point
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
from decomp_kernels.cli.errors import BadInput, CheckFailed

METHODS = ["lora", "dora", "ssb"]
SHAPE, QUICK_SHAPE, GPU_SHAPE = (512, 1024, 1024), (64, 128, 128), (4096, 4096, 4096)


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "scale",
        help="how time and memory grow with tokens, width, rank, layers and processes",
        description="Forward + backward of an adapted stack of linears next to the frozen one and "
        "PEFT's, while one size grows and the others stay: tokens M, out N, in K, rank r, layers, "
        "and ranks, which are data parallel processes. Prints the exponents e of time ~ size^e "
        "and of memory, with their standard errors, for the stack and for what the adapter adds.",
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME",
                        help=f"default: {' '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument(
        "--sizes", type=sizes, action="append", default=[], metavar="AXIS=SIZE,SIZE,...",
        help="instead of an axis's own sizes, such as M=64,256,1024; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=shape, metavar="M,K,N",
        help="tokens, in, out of what does not grow (default: 512,1024,1024; a stack is K x K)",
    )  # fmt: skip
    parser.add_argument("--rank", type=positive, default=16, help="r where it does not grow")
    parser.add_argument(
        "--layers", type=positive, default=2, help="layers of each process on the axis ranks"
    )
    parser.add_argument(
        "--dtype", choices=growth.DTYPES, help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave out PEFT and the formulas")
    parser.add_argument(
        "--timeout", type=positive, default=900, metavar="SECONDS",
        help="after which the processes of one number of ranks are killed (default: 900)",
    )  # fmt: skip
    add_protocol(parser, rounds=15, quick_rounds=5)
    parser.set_defaults(run=run)


def sizes(text: str) -> tuple[str, tuple[int, ...]]:
    """AXIS=SIZE,SIZE,... as (axis, sizes in growing order)."""
    axis, equals, given = text.partition("=")
    numbers = given.split(",")
    if axis not in AXES or not equals or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise argparse.ArgumentTypeError(
            f"must be an axis of {', '.join(AXES)}, = and positive numbers, such as "
            f"M=64,256,1024, got {text!r}"
        )
    return axis, tuple(sorted({int(number) for number in numbers}))


def run(args: argparse.Namespace) -> int:
    on_gpu = device_of(args).type == "cuda"
    todo = _points(args, on_gpu)
    check_memory(max(map(growth.least_bytes, todo)), device_of(args))
    protocol = protocol_of(args) | {
        "peer": not args.no_peer,
        "timeout": args.timeout,
        "shape": args.shape or _usual_shape(args, on_gpu),
        "rank": args.rank,
        "layers": args.layers,
    }
    results = Results(args, protocol)
    left = results.left(todo)
    started = time.monotonic()
    for number, row in enumerate(_rows(left, protocol), start=1):
        results.add(row)
        _progress(number, len(left), row, time.monotonic() - started)
    return finish(args, results.document(), scale_tables)


def _usual_shape(args: argparse.Namespace, on_gpu: bool) -> tuple[int, int, int]:
    return QUICK_SHAPE if args.quick else GPU_SHAPE if on_gpu else SHAPE


def _points(args: argparse.Namespace, on_gpu: bool) -> list[Point]:
    """What there is to measure, checked."""
    own = growth.QUICK_SIZES if args.quick else growth.GPU_SIZES if on_gpu else growth.CPU_SIZES
    if on_gpu:
        gpus = torch.cuda.device_count()
        own = {**own, "ranks": [size for size in own["ranks"] if size <= max(1, gpus)]}
    wanted = {**own, **dict(args.sizes)}
    if on_gpu and "ranks" in args.axes and max(wanted["ranks"]) > gpus:
        raise BadInput(
            f"ranks on {args.device} must be at most the number of GPUs here, {gpus}, got "
            f"{max(wanted['ranks'])}; give --sizes ranks=..., or leave ranks out of --axes"
        )
    try:
        todo = list(
            growth.points(
                dict.fromkeys(args.methods), dict.fromkeys(args.axes), wanted,
                shape=args.shape or _usual_shape(args, on_gpu), r=args.rank, layers=args.layers,
                dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
            )
        )  # fmt: skip
        for point in todo:
            growth.check(point)
    except ValueError as error:
        raise BadInput(str(error)) from None
    most = 16 * ranks.cores()
    if (asked := max([point.ranks for point in todo], default=1)) > most:
        raise BadInput(
            f"ranks are processes: there must be at most {most} on {ranks.cores()} cores, got "
            f"{asked}; give --sizes ranks=..."
        )
    if not todo:
        raise BadInput(
            f"the axis r is for methods with a rank, got {', '.join(args.methods)}; name one such "
            "as lora, or another axis"
        )
    return todo


def _rows(todo: list[Point], protocol: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each point; those of one number of ranks come together, from one start."""
    common: dict[str, Any] = {
        "rounds": protocol["rounds"], "warmup": protocol["warmup"], "seed": protocol["seed"],
        "device": torch.device(protocol["device"]), "peer": protocol["peer"],
        "clock": time.thread_time_ns if protocol["clock"] == "cpu" else None,
    }  # fmt: skip
    parallel = [point for point in todo if point.axis == "ranks"]
    for point in todo:
        if point.axis != "ranks":
            yield growth.run(point, **common | {"clock": clock_of(protocol)})
    for world in dict.fromkeys(point.ranks for point in parallel):
        some = [point for point in parallel if point.ranks == world]
        threads = 1 if common["device"].type == "cpu" else protocol["threads"]
        try:
            yield from ranks.run(some, threads=threads, timeout=protocol["timeout"], **common)
        except ranks.RanksFailed as error:
            raise CheckFailed(str(error)) from None


def _progress(number: int, total: int, row: dict[str, Any], seconds: float) -> None:
    found = row["contenders"]
    ratios = [
        f"{name} {found[name]['ratio']['both']['median']:.2f}"
        for name in (OURS, scale_tables.peer_of(row))
        if name in found
    ]
    ms = scale_tables.time_of(FROZEN)(row) or 0.0
    print(
        f"{number}/{total}  {row['label']}: frozen {ms / 1e6:.2f} ms, {', '.join(ratios)}  "
        f"({seconds:.0f} s so far)",
        file=sys.stderr,
        flush=True,
    )
