"""``decomp-kernels plan``: memory of fine-tuning, a table over methods and numbers of GPUs."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from decomp_kernels.bench.tables import counted
from decomp_kernels.cli.errors import BadInput, one_line
from decomp_kernels.cli.explain import DTYPES
from decomp_kernels.cli.options import MethodChoice, parse_names
from decomp_kernels.cli.text import aligned
from decomp_kernels.cli.unloaded import UNUSABLE, configuration, unloaded
from decomp_kernels.methods.base import Method
from decomp_kernels.planning import Plan, plan

METHODS = ("ssb", "lora", "dora")
GIB = 2**30
ASKED = (
    "model", "batch_size", "sequence_length", "dtype", "adapter_dtype", "quantized",
    "checkpointing", "optimizer", "gpus", "target_modules", "memory",
)  # fmt: skip
ASSUMED = """\
Counted on shapes, for eager transformers with FlashAttention; no GPU has measured it.  Left out:
temporaries, such as the gradient of the logits, and what communication and the allocator hold."""


def gpu_counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise argparse.ArgumentTypeError(
            f"must be whole numbers of at least 1 such as 1,8,64, got {text!r}"
        )
    return sorted({int(count) for count in counts})


def gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"must be GiB, a number greater than 0, got {text!r}")
    return size


def run(args: argparse.Namespace) -> int:
    choices = getattr(args, "method", None) or [MethodChoice(name) for name in METHODS]
    methods = [choice.make() for choice in choices]
    plans = {
        _name(choice): _planned(args, method)
        for choice, method in zip(choices, methods, strict=True)
    }
    print(json.dumps(_as_json(args, plans), indent=1) if args.json else _text(args, plans))
    return 0


def _planned(args: argparse.Namespace, method: Method) -> Plan:
    made = unloaded(
        configuration(args.model), DTYPES[args.dtype], args.batch_size, args.sequence_length
    )
    if args.checkpointing == "block" and not made.blocks:
        raise BadInput(f"{args.model} has no layers that transformers can checkpoint")
    try:
        return plan(
            made.model,
            method,
            made.forward,
            made.blocks,
            target_modules=parse_names(args.target_modules),
            float32_adapter=args.adapter_dtype == "float32",
            quantized=args.quantized,
            optimizer=args.optimizer,
            gpus=args.gpus,
        )
    except UNUSABLE as error:
        raise BadInput(f"{args.model} with {method.name}: {one_line(error)}") from None


def _name(choice: MethodChoice) -> str:
    return " ".join([choice.name, *(f"{key}={value}" for key, value in choice.options.items())])


def _totals(args: argparse.Namespace, found: Plan) -> dict[str, int]:
    """{what: bytes a GPU}: one GPU or DDP, and FSDP2 on each number above one."""
    checkpointed = args.checkpointing == "block"
    totals = {"DDP": found.whole(checkpointed)}
    for gpus in args.gpus:
        if gpus > 1:
            totals[f"FSDP2 {gpus}"] = found.sharded(gpus, checkpointed)
    return totals


def _text(args: argparse.Namespace, plans: dict[str, Plan]) -> str:
    first = next(iter(plans.values()))
    parts = [
        ["GiB", "trainable", "% of model", "weights", "adapters", "gradients", "optimizer", "saved"]
    ]
    totals = [["GiB a GPU", *map(_heading, _totals(args, first))]]
    for name, found in plans.items():
        saved = found.saved.held(args.checkpointing == "block")
        sizes = (found.base, found.adapters, found.gradients, found.optimizer, saved)
        share = f"{100 * found.trainable / found.parameters:.3f}"
        parts.append([name, f"{found.trainable:,}", share, *map(_gib, sizes)])
        totals.append([name, *(_marked(args, size) for size in _totals(args, found).values())])
    base = args.quantized or args.dtype
    rows, tokens = counted(args.batch_size, "row"), counted(args.sequence_length, "token")
    lines = [
        f"{args.model}, {first.model}: {first.parameters:,} parameters in {base}",
        f"{rows} of {tokens} a GPU; {args.optimizer}; checkpointing: {args.checkpointing}",
        "",
        aligned(parts, numbers=True),
        "",
        aligned(totals, numbers=True),
        "",
    ]
    if args.memory is not None:
        lines.append(f"* fits in {args.memory:g} GiB by what is counted.")
    return "\n".join([*lines, ASSUMED])


def _heading(what: str) -> str:
    return "1 or DDP" if what == "DDP" else f"{what} GPUs"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}" if size >= GIB / 100 or size == 0 else f"{size / GIB:.1e}"


def _marked(args: argparse.Namespace, size: int) -> str:
    if args.memory is None:
        return _gib(size)
    return _gib(size) + ("*" if size <= args.memory * GIB else " ")


def _as_json(args: argparse.Namespace, plans: dict[str, Plan]) -> dict[str, Any]:
    made = {
        name: {**asdict(found), "saved": found.saved._asdict(), "per_gpu": _totals(args, found)}
        for name, found in plans.items()
    }
    return {
        "asked": {name: getattr(args, name) for name in ASKED},
        "plans": made,
        "assumed": " ".join(ASSUMED.split()),
    }
