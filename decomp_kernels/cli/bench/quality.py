"""``bench quality``: what methods gain at matched budgets, on a task that anyone can run."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.bench import quality_tables, record
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.shapes import not_negative, positive
from decomp_kernels.cli import models, quality, quality_arms
from decomp_kernels.cli import options as defaults
from decomp_kernels.cli.bench.protocol import add_protocol, clock_of, finish, protocol_of
from decomp_kernels.cli.bench.results import earlier_rows
from decomp_kernels.cli.datasets import Data, gather
from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.glue import GLUE, Glue, heads_of, read_glue
from decomp_kernels.cli.quality_arms import ALL_SIX, METHODS, SCALED, Arm
from decomp_kernels.cli.retrieval import Retrieval

FACTORS = (1 / 3, 1.0, 3.0)
# These may differ between the parts of a run: they change no score.
FREE = ("rounds", "warmup", "threads", "clock", "seed")
# (steps, batch size, longest text, validation rows, test rows)
PLAIN, QUICK = (60, 16, 32, 400, None), (6, 4, 16, 20, 60)


def add(suites: Any) -> None:
    parser = suites.add_parser(
        "quality",
        help="what methods gain at matched budgets",
        description="Train each method with several seeds at matched numbers of parameters, after "
        "the same small search of its learning rate on rows of its own; then measure time and "
        "memory of all of them in one interleaved run.  The task is that of `train`: find a "
        "function of Python's standard library by its docstring; or one of GLUE's, from files.",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", default=list(METHODS),
        help=f"of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--rank", nargs="+", type=positive, default=[8],
        help="of LoRA: the others' are matched to its number of parameters; several are several "
        "budgets (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--only-seeds", nargs="+", type=not_negative, default=[0, 1, 2, 3, 4], metavar="SEED",
        help="default: 0 1 2 3 4",
    )  # fmt: skip
    parser.add_argument(
        "--rates", nargs="+", type=_factor, metavar="FACTOR",
        help="the grid of learning rates, times the method's own (default: 1/3 1 3)",
    )  # fmt: skip
    parser.add_argument(
        "--lr-search", choices=("on", "off"),
        help="off: the method's own rate (default: on, for GLUE and with --quick off)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=_factor, metavar="RATE",
        help="the middle of the grid, for every method (default: the method's own; for GLUE the "
        "paper's, by task)",
    )  # fmt: skip
    parser.add_argument("--mpc-coef", type=float, default=0.1, help="of MPC_o and MPC_d")
    parser.add_argument("--task", default="retrieval", metavar="retrieval|glue:NAME")
    parser.add_argument(
        "--data", type=Path, metavar="PATH",
        help="retrieval: a .jsonl or .csv file (default: docstrings); GLUE: the task's folder",
    )  # fmt: skip
    parser.add_argument("--model", metavar="FOLDER|ID", help="an encoder (default: MiniLM)")
    parser.add_argument("--steps", type=positive, help="default: 60; for GLUE the paper's epochs")
    parser.add_argument("--batch-size", type=positive, help="default: 16; for GLUE 32")
    parser.add_argument("--max-length", type=positive, help="tokens (default: 32; for GLUE 128)")
    parser.add_argument(
        "--reconstruction-modules", metavar="NAMES", default=",".join(SCALED),
        help="linears of SSL, SSB and IA3 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--extension-modules", metavar="NAMES", default=",".join(ALL_SIX),
        help="linears of all others (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--base-dropout", action="store_true", help="the model's own dropout too")
    add_protocol(parser, rounds=12, quick_rounds=2, optional=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    measuring = protocol_of(args)
    _check_not_there(args)
    setting, described, rate_of = _setting(args, torch.device(args.device))
    arms = quality_arms.arms(
        setting.base, args.methods, args.rank, setting.steps, setting.heads,
        defaults.parse_names(args.reconstruction_modules),
        defaults.parse_names(args.extension_modules),
    )  # fmt: skip
    protocol = measuring | described
    found = _by_identity(earlier_rows(args, protocol, FREE))
    search = described["lr_search"]
    heads_alone: list[Arm | None] = [None] if setting.heads else []
    everyone = heads_alone + arms
    total = len(everyone) * (len(args.only_seeds) + len(described["rates"]) * search)
    done = 0
    spent: list[float] = []

    def keep(row: dict[str, Any]) -> None:
        found[_identity(row)] = row | {"commit": record.commit()}
        if args.output is not None:
            record.write(args.output, _document(protocol, list(found.values())))

    def one(arm: Arm | None, kind: str, seed: int, rate: float) -> dict[str, Any]:
        nonlocal done
        done += 1
        key = arm.key if arm else quality_arms.FROZEN
        row = found.get((kind, key, seed, rate))
        if row is None:
            row = quality.train(setting, arm, kind, seed, rate)
            keep(row)
            spent.append(row["seconds"])
            left = sum(spent) / len(spent) * (total - done) / 60
            scores = ", ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
            _tell(f"{done}/{total}  {key}  {kind}, seed {seed}, rate {rate:.3g}: {scores}  "
                  f"({row['seconds']:.0f} s; {left:.0f} min left)")  # fmt: skip
        return row

    if not setting.heads and ("run", quality_arms.FROZEN, None, None) not in found:
        keep(quality.untrained(setting))
    chosen: dict[Any, float] = {}
    for arm in everyone:
        grid = [_round(rate_of(arm) * factor) for factor in described["rates"]]
        if search:
            tried = [one(arm, "search", quality.SEARCH_SEED, rate) for rate in grid]
            chosen[arm] = quality.best_rate(tried)
        else:
            chosen[arm] = _round(rate_of(arm))
    for seed in args.only_seeds:
        for arm in everyone:
            one(arm, "run", seed, chosen[arm])
    if protocol["rounds"] and not _has_cost(found.get("cost"), arms, protocol):
        keep(quality.cost(setting, arms, protocol, clock_of(protocol), _tell))
    _tell(f"{len(spent)} trainings, {(time.monotonic() - began) / 60:.1f} min")
    return finish(args, _document(protocol, list(found.values())), quality_tables)


def _setting(
    args: argparse.Namespace, device: torch.device
) -> tuple[quality.Setting, dict[str, Any], Callable[[Arm | None], float]]:
    """(the setting, what the results file says of it, the middle of an arm's grid of rates)."""
    steps, batch, length, held, tested = QUICK if args.quick else PLAIN
    kind, _, name = args.task.partition(":")
    if args.task != "retrieval" and (kind != "glue" or name not in GLUE):
        raise BadInput(
            f"--task must be retrieval, or glue: and one of {', '.join(GLUE)}, got {args.task!r}"
        )
    if not (math.isfinite(args.mpc_coef) and args.mpc_coef >= 0):
        raise BadInput(f"--mpc-coef must be at least 0, got {args.mpc_coef}")
    glue = kind == "glue"
    search = args.lr_search == "on" or (args.lr_search is None and not (glue or args.quick))
    matrices, scales = (
        args.lr or defaults.BUILT_IN_RATE,
        args.lr or defaults.BUILT_IN_RATE_OF_SCALES,
    )
    heads: tuple[str, ...] = ()
    if glue:
        if args.data is None:
            raise BadInput(f"--task {args.task} needs --data, the folder with the task's files")
        known = GLUE[name]
        data = read_glue(args.data, known)
        batch, length = (batch, length) if args.quick else (32, 128)
        pretrained = models.load(args.model, "retrieval", torch.float32, device, known.outputs)
        heads = heads_of(pretrained.model)
        matrices = scales = args.lr or known.rate
    else:
        if args.model is not None and args.data is None:
            raise BadInput("--model needs --data: without both, the built-in task is run")
        path = None if args.data is None else str(args.data)
        data = gather(path, None, None, "retrieval")
        pretrained = models.load(args.model, "retrieval", torch.float32, device)
    batch, length = args.batch_size or batch, args.max_length or length
    data = Data(data.train, data.held_out[:tested], data.name)
    validation = data.train[: min(held, len(data.train) // 4)] if search or not glue else []
    train = data.train[len(validation) :]
    if len(train) < batch:
        raise BadInput(f"--batch-size must be at most the {len(train)} training rows, got {batch}")
    if glue and not args.quick:
        steps = max(1, round(known.epochs * (len(train) // batch)))
    steps = args.steps or steps

    def task(held_out: list) -> Any:
        if glue:
            return Glue(known, train, held_out, pretrained.tokenizer, length)
        return Retrieval(train, held_out, pretrained.tokenizer, length, "mean")

    setting = quality.Setting(
        pretrained.model, task(data.held_out), task(validation) if search else None, heads, steps,
        batch, args.mpc_coef, args.base_dropout, device,
    )  # fmt: skip
    described = {
        "task": args.task, "model": pretrained.name, "data": data.name, "data_sha256": data.sha256,
        "train": len(train), "validation": len(validation), "test": len(data.held_out),
        "steps": steps, "batch_size": batch, "max_length": length, "mpc_coef": args.mpc_coef,
        "base_dropout": args.base_dropout, "lr_search": search, "lr": args.lr,
        "rates": [round(factor, 6) for factor in args.rates or FACTORS],
        "search_seed": quality.SEARCH_SEED,
        "modules": [args.reconstruction_modules, args.extension_modules],
        "metrics": list(setting.test.metrics),
    }  # fmt: skip
    return setting, described, lambda arm: arm.rate(matrices, scales) if arm else matrices


def _check_not_there(args: argparse.Namespace) -> None:
    """An hour of training is never written over by accident."""
    if args.output is not None and args.output.exists() and not args.resume:
        raise BadInput(
            f"{args.output} is there already: give --resume to go on with it, or another --output"
        )


def _document(protocol: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds, threads and clock are those of the timing, where there is one."""
    timed = next((row for row in rows if row["kind"] == "cost"), None)
    if timed is not None:
        protocol = protocol | {name: timed[name] for name in ("rounds", "threads", "clock")}
    return record.document("quality", protocol, rows)


def _identity(row: dict[str, Any]) -> Any:
    if row["kind"] == "cost":
        return "cost"
    return row["kind"], row["key"], row["seed"], row["rate"]


def _by_identity(rows: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    try:
        return {_identity(row): row for row in rows}
    except (KeyError, TypeError) as error:  # a part is missing, or is no text or number
        raise BadInput(
            "the rows must be those that the suite 'quality' writes, got "
            f"{type(error).__name__}: {error}; measure again with this version"
        ) from None


def _has_cost(row: dict[str, Any] | None, arms: list[Arm], protocol: dict[str, Any]) -> bool:
    """Whether the timing is there: of these arms in this way, or of more than these."""
    keys = {arm.key for arm in arms}
    known = row["contenders"].keys() - {FROZEN, CONTROL} if row is not None else set()
    return row is not None and (
        keys < known
        or (
            keys == known
            and all(row[name] == protocol[name] for name in ("rounds", "threads", "clock"))
        )
    )


def _round(rate: float) -> float:
    """Three digits: the same rate in every run, and in the file as it reads."""
    return float(f"{rate:.3g}")


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text!r}")
    return value


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
