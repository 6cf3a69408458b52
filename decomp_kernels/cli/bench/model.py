"""``bench model``: one training step of a Llama-shaped decoder."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import torch

from decomp_kernels.bench import decoder, model_tables
from decomp_kernels.bench.agreement import Disagreement
from decomp_kernels.bench.layers import ADAPTER_DTYPES
from decomp_kernels.bench.shapes import positive
from decomp_kernels.bench.tables import counted
from decomp_kernels.cli.bench.protocol import (
    add_protocol,
    check_memory,
    clock_of,
    device_of,
    finish,
    protocol_of,
)
from decomp_kernels.cli.bench.results import Results
from decomp_kernels.cli.errors import BadInput, CheckFailed, need, one_line

DTYPES = ("float32", "bfloat16")
QUICK = decoder.Size(
    hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, vocab=512, batch=2, sequence=64
)


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "model",
        help="one training step of a Llama-shaped decoder, next to PEFT",
        description="Tokens per second and memory of one training step (forward, backward, AdamW "
        "on the adapters) of a Llama-shaped decoder with random weights: the frozen model, an "
        "identical second one as control, ours, PEFT's, PEFT's after accelerate, or the formula of "
        "a method that PEFT lacks. Losses and gradients are compared before anything is timed.",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=["lora", "dora", "ssb"])
    for field in fields(decoder.Size):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=positive, metavar="N",
            help=f"default: {field.default}, with --quick {getattr(QUICK, field.name)}",
        )  # fmt: skip
    parser.add_argument("--targets", nargs="+", choices=decoder.TARGETS, default=decoder.TARGETS)
    parser.add_argument("--rank", type=positive, help="default: 16, with --quick 4")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0], metavar="P")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: both, with --quick float32"
    )  # fmt: skip
    parser.add_argument(
        "--adapter-dtype", nargs="+", choices=ADAPTER_DTYPES, default=["base"],
        help="base: the model's own; float32: PEFT's default on a 16-bit model",
    )  # fmt: skip
    parser.add_argument(
        "--checkpointing", choices=(*decoder.CHECKPOINTING, "both"), default="both",
        help="block: each decoder layer keeps its input alone and runs again in backward",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND",
        help="ours and the peer under torch.compile too (inductor; minutes a row on a CPU)",
    )  # fmt: skip
    add_protocol(parser, rounds=9, quick_rounds=3)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rank = args.rank or (4 if args.quick else 16)
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    kinds = decoder.CHECKPOINTING if args.checkpointing == "both" else (args.checkpointing,)
    try:
        todo = list(
            decoder.rows(
                args.methods, _size(args), dtypes, rank=rank, dropouts=args.dropout,
                checkpointing=kinds, adapter_dtypes=args.adapter_dtype, targets=args.targets,
            )
        )  # fmt: skip
        need("transformers", "train")
        for row in todo:
            width = decoder.DTYPES[row.dtype].itemsize
            check_memory(width * row.size.parameters, device_of(args))
            decoder.check(row)
    except (TypeError, ValueError) as error:
        raise BadInput(one_line(error)) from None
    protocol = protocol_of(args) | {
        "warmup": 1,  # each model has had three steps by then
        "rank": rank,
        "compile": args.compile,
    }
    if args.compile is not None:
        _check_backend(args.compile, args.device)
    results = Results(args, protocol)
    left = results.left(todo)
    size = todo[0].size
    print(
        f"{counted(len(left), 'row')}, a model of {size.parameters / 1e6:,.1f} M parameters, "
        f"{size.batch} x {size.sequence} tokens a step",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    for found in _measure(left, protocol):
        results.add(found)
    return finish(args, results.document(), model_tables)


def _size(args: argparse.Namespace) -> decoder.Size:
    sizes = asdict(QUICK if args.quick else decoder.Size())
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    return decoder.Size(**(sizes | given))


def _check_backend(backend: str, device: str) -> None:
    """Compile something small: without a C++ compiler, say, Inductor cannot."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(4, device=device))
    except Exception as error:
        raise BadInput(
            f"--compile {backend} must be a backend of torch.compile that works here (those known: "
            f"{', '.join(torch._dynamo.list_backends())}), got: {one_line(error)[:300]}"
        ) from None


def _measure(todo: list[decoder.Row], protocol: dict[str, Any]) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    for number, row in enumerate(todo, start=1):
        try:
            found = decoder.run(
                row,
                rounds=protocol["rounds"],
                warmup=protocol["warmup"],
                seed=protocol["seed"],
                device=torch.device(protocol["device"]),
                clock=clock_of(protocol),
                backend=protocol["compile"],
            )
        except Disagreement as error:
            raise CheckFailed(f"{row.label}, {row.dtype}: {error}") from None
        left = (time.monotonic() - started) / number * (len(todo) - number)
        print(
            f"{number}/{len(todo)}  {model_tables.progress(found)}  ({found['seconds']:.0f} s, "
            f"about {left / 60:.0f} min left)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        yield found
