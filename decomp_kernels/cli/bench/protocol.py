"""What every suite is asked: how many rounds, on what, with which clock, and where it writes."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.bench import engine, record
from decomp_kernels.bench.shapes import not_negative, positive
from decomp_kernels.bench.tables import headline, texts
from decomp_kernels.cli.errors import BadInput, need


def add_protocol(
    parser: argparse.ArgumentParser, rounds: int, quick_rounds: int, optional: bool = False
) -> None:
    """optional: --rounds 0 leaves the timing out."""
    parser.add_argument(
        "--rounds",
        type=not_negative if optional else positive,
        help=f"default: {rounds}, with --quick {quick_rounds}",
    )
    parser.add_argument("--threads", type=positive, help="default: PyTorch's own choice")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: the CPU time of the thread, with --threads 1: on a machine that others use too",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.set_defaults(default_rounds=(rounds, quick_rounds))
    parser.add_argument(
        "--resume", action="store_true",
        help="keep what --output has already, of the same options, machine and packages, and "
        "measure the rest; it is written after each row",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="samples and all the rest")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")


def protocol_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options as the results file has them, checked; torch's threads are set."""
    if args.clock == "cpu" and (args.threads != 1 or args.device != "cpu"):
        raise BadInput(
            "--clock cpu is the CPU time of one thread: give --threads 1 and --device cpu with it, "
            f"got --threads {args.threads} and --device {args.device}"
        )
    device_of(args)
    cores = os.cpu_count() or 1
    if args.threads is not None and args.threads > cores:
        raise BadInput(f"--threads must be at most the {cores} cores here, got {args.threads}")
    try:
        torch.Generator().manual_seed(args.seed)
    except (RuntimeError, ValueError, OverflowError):
        raise BadInput(f"--seed must be a number of at most 64 bits, got {args.seed}") from None
    if args.picture is not None:
        need("matplotlib", "train")  # now, not after the measuring
    record.commit()  # which it is now, not when all is measured
    check_places(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return {
        "rounds": args.default_rounds[args.quick] if args.rounds is None else args.rounds,
        "warmup": 3,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "device": args.device,
        "seed": args.seed,
    }


def device_of(args: argparse.Namespace) -> torch.device:
    """The device, once something was computed on it: "meta" holds no numbers."""
    try:
        torch.zeros(1, device=args.device).item()
        return torch.device(args.device)
    except (RuntimeError, AssertionError):
        raise BadInput(
            f"--device {args.device} needs a device that PyTorch sees; it sees "
            f"{torch.accelerator.current_accelerator() or 'the CPU alone'}"
        ) from None


def check_memory(least: int, device: torch.device) -> None:
    """BadInput where the sizes asked for need more than there is: a CPU's process is killed."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return  # Windows does not tell it here
    if least > there:
        raise BadInput(
            f"the sizes must fit the memory of {device}, {there / 2**30:.1f} GiB, got some that "
            f"need at least {least / 2**30:,.1f} GiB; give smaller ones"
        )


def check_places(args: argparse.Namespace) -> None:
    """Make the folders of what will be written, before the work; nothing but an older file of the
    same suite is written over.
    """
    for path in (args.output, args.picture):
        if path is not None:
            record.check_place(path)
    if args.output is not None and args.output == args.picture:
        raise BadInput(f"--output and --picture must be two files, got {args.output} for both")
    if args.output is not None and args.output.exists():
        try:
            record.read(args.output, args.suite)
        except ValueError as error:  # another suite's results, or no results at all
            raise BadInput(f"--output is there already, and {error}") from None


def finish(args: argparse.Namespace, content: dict[str, Any], suite: Any) -> int:
    """Print what was measured, and write what was asked for.  suite: its module of tables."""
    print(f"{headline(content)}\n\n{texts(suite.tables(content))}")
    if args.output is not None:
        record.write(args.output, content)
        print(f"written: {args.output}")
    if args.picture is not None:
        suite.picture(content, args.picture)
        print(f"written: {args.picture}")
    return 0


def clock_of(protocol: dict[str, Any]) -> engine.Clock:
    if protocol["clock"] == "cpu":
        return time.thread_time_ns
    return engine.device_clock(torch.device(protocol["device"]))
