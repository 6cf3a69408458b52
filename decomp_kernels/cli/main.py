"""``decomp-kernels``: what the command line says, and nothing of what it does."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decomp_kernels import __version__
from decomp_kernels.bench.shapes import positive, shape
from decomp_kernels.cli import convert, explain, info, inspect, methods, plan
from decomp_kernels.cli.errors import BadInput, CheckFailed, Interrupted

TRAIN = """\
Put one or more methods on the linear layers of a pretrained transformers model, fine-tune each,
measure what it gained on held-out rows, save and check the adapters, and compare time and memory
with the frozen model and with the same method in PEFT.  Without --model and --data: a MiniLM
sentence encoder learns to find functions of Python's standard library by their docstrings."""

DATA = """\
data:
  JSONL (one object a line) or CSV (with a header), UTF-8; other columns are ignored
  encoder           query, document       texts that belong together; learned by in-batch
                                          contrast, measured by recall@1 and @10
  language model    text                  learned as a whole, measured by loss and perplexity
                    prompt, completion    the completion alone is learned

examples:
  decomp-kernels train
  decomp-kernels train --model ./encoder --data pairs.csv --method lora -O r=16 --lr 1e-3
  decomp-kernels train --model ./llama --data notes.jsonl --method ssb,dora --epochs 2 --resume

A configuration file (--config, YAML or JSON) has the same options as keys; the command line wins:
  method: [ssb, {name: lora, r: 16, alpha: 32, lr: 0.001}]
  steps: 200"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = _parser(arguments).parse_args(arguments)
    try:
        return args.run(args)
    except (BadInput, CheckFailed, Interrupted) as error:
        print(f"decomp-kernels {args.command}: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of a pipe went away, as head does
            sys.stderr.close()
            return 0
        print(f"decomp-kernels {args.command}: {error}", file=sys.stderr)
        return BadInput.code
    except KeyboardInterrupt:
        print(f"\ndecomp-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="decomp-kernels",
        description="Parameter-efficient fine-tuning on one fused linear operator.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(commands)

    shown = commands.add_parser("methods", help="the methods, as a table")
    shown.add_argument("name", nargs="?", help="one method: its formula, paper and options")
    shown.add_argument("--markdown", action="store_true", help="the table as a Markdown document")
    shown.set_defaults(run=methods.run)

    machine = commands.add_parser("info", help="what this machine has")
    machine.add_argument("--json", action="store_true")
    machine.set_defaults(run=info.run)

    compiled = commands.add_parser("inspect", help="the Triton kernels, compiled without a GPU")
    compiled.add_argument("--all", action="store_true", help="every dtype and option; minutes")
    compiled.add_argument("--kernel", action="append", choices=inspect.KERNELS, help="only this")
    compiled.add_argument("--arch", action="append", choices=inspect.LIMITS, help="only this")
    compiled.add_argument("--json", action="store_true")
    compiled.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="processes; default 1"
    )
    compiled.add_argument(
        "--spills", type=int, default=0, metavar="BYTES",
        help="what a thread may spill (default: 0); older assemblers spill a few bytes more",
    )  # fmt: skip
    compiled.add_argument(
        "--into", type=Path, metavar="FILE.md",
        help="write a summary into this file, between its <!-- inspect --> lines",
    )  # fmt: skip
    compiled.set_defaults(run=inspect.run)

    told = commands.add_parser("explain", help="one layer: which implementation, why, roofline")
    told.add_argument("--method", default="lora", metavar="NAME", help="default: lora")
    told.add_argument("-O", "--option", action="append", default=[], metavar="KEY=VALUE")
    told.add_argument(
        "--shape", type=shape, default=(8192, 4096, 4096), metavar="M,K,N",
        help="tokens, in, out (default: 8192,4096,4096)",
    )  # fmt: skip
    told.add_argument("--dtype", choices=explain.DTYPES, default="bfloat16", help="of the base")
    told.add_argument("--float32-adapter", action="store_true", help="on a 16-bit base, as PEFT")
    told.add_argument("--device", metavar="GPU", help="H200, ...; default: the CPU")
    told.add_argument("--inference", action="store_true", help="the forward alone")
    told.add_argument("--json", action="store_true")
    told.set_defaults(run=explain.run)

    converted = commands.add_parser(
        "convert",
        help="an adapter in PEFT's format, in ours, or as plain LoRA",
        description=convert.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_arguments(converted)
    converted.set_defaults(run=convert.run)

    tuned = commands.add_parser("tune", help="measure tiles and implementations here")
    if arguments[:1] == ["tune"]:
        from decomp_kernels.cli import tune

        tune.add_arguments(tuned)
        tuned.set_defaults(run=tune.run)

    _plan(commands)

    bench = commands.add_parser("bench", help="time and memory, next to PEFT's")
    if arguments[:1] == ["bench"]:  # its suites are imported by itself alone
        from decomp_kernels.cli.bench import command

        command.add_arguments(bench)
    return parser


def _plan(commands: Any) -> None:
    planned = commands.add_parser(
        "plan",
        help="memory of fine-tuning, by method and number of GPUs",
        description="What fine-tuning holds on each GPU, counted on the shapes of a model's "
        "configuration: no weights are loaded and no GPU is needed.",
        allow_abbrev=False,
    )
    planned.add_argument(
        "--model", default="llama-8b", metavar="SHAPE|CONFIG",
        help="llama-8b (default), llama-70b, a config.json, a folder with one, or a hub id",
    )  # fmt: skip
    planned.add_argument(
        "--method", action=_Method, default=argparse.SUPPRESS, metavar="NAME[,NAME]",
        help="may be repeated (default: ssb,lora,dora)",
    )  # fmt: skip
    planned.add_argument(
        "-O", "--option", action=_Option, default=argparse.SUPPRESS, dest="method",
        metavar="KEY=VALUE", help="of the --method before it, such as r=16; may be repeated",
    )  # fmt: skip
    planned.add_argument(
        "--target-modules", default="all-linear", metavar="NAMES",
        help="all-linear (default), names such as q_proj,v_proj, or a regular expression",
    )  # fmt: skip
    planned.add_argument(
        "--batch-size", type=positive, default=1, metavar="ROWS", help="of one GPU (default: 1)"
    )
    planned.add_argument(
        "--sequence-length", type=positive, default=2048, metavar="TOKENS", help="default: 2048"
    )
    planned.add_argument("--dtype", choices=explain.DTYPES, default="bfloat16", help="of the base")
    planned.add_argument(
        "--adapter-dtype", choices=("float32", "base"), default="float32",
        help="of the adapters' matrices: float32 (default), or the base's",
    )  # fmt: skip
    planned.add_argument(
        "--quantized", choices=("nf4", "int8"), help="the linears' weights, but for the head's"
    )
    planned.add_argument(
        "--checkpointing", choices=("none", "block"), default="none",
        help="block: each layer is computed again in backward",
    )  # fmt: skip
    planned.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    planned.add_argument(
        "--gpus", type=plan.gpu_counts, default=[1, 2, 8, 64], metavar="N,N",
        help="default: 1,2,8,64",
    )  # fmt: skip
    planned.add_argument(
        "--memory", type=plan.gibibytes, metavar="GIB", help="of a GPU: marks what fits"
    )
    planned.add_argument("--json", action="store_true", help="in bytes")
    planned.set_defaults(run=plan.run)


def _train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="fine-tune a pretrained model",
        description=TRAIN,
        epilog=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run_train)

    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flags, words, settings in options:
            group.add_argument(*flags.split(), help=words, **settings)


def _run_train(args: argparse.Namespace) -> int:
    from decomp_kernels.cli import options, train

    given = {
        name: value for name, value in vars(args).items() if name not in ("run", "command", "_last")
    }
    for name in ("target_modules", "exclude_modules"):
        if name in given:
            given[name] = options.parse_names(given[name])
    return train.run(options.gather(given))


class _Method(argparse.Action):
    """--method a,b: two more methods; what follows is theirs."""

    def __call__(self, parser, namespace, value, option_string=None):
        from decomp_kernels.cli.options import MethodChoice

        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            parser.error("--method must name a method")
        chosen = getattr(namespace, "method", [])
        namespace.method = chosen + [MethodChoice(name) for name in names]
        namespace._last = len(names)


class _Option(argparse.Action):
    """-O key=value, for the methods that the --method before it named."""

    def __call__(self, parser, namespace, value, option_string=None):
        from decomp_kernels.cli.options import parse_value

        key, equals, text = value.partition("=")
        if not key or not equals:
            parser.error(f"{option_string} must be KEY=VALUE such as r=16, got {value!r}")
        if not hasattr(namespace, "method"):
            parser.error(f"{option_string} {value} must come after the --method it is for")
        for choice in namespace.method[-namespace._last :]:
            choice.options[key.replace("-", "_")] = parse_value(text)


class _Rate(argparse.Action):
    """--lr, for the methods before it, or for all of them."""

    def __call__(self, parser, namespace, value, option_string=None):
        try:
            rate = float(value)
        except ValueError:
            parser.error(f"--lr must be a number, got {value!r}")
        if not hasattr(namespace, "method"):
            namespace.lr = rate
            return
        for choice in namespace.method[-namespace._last :]:
            choice.lr = rate


# Titles of the groups: (flags, help, settings of argparse).  Defaults are options.TrainOptions'.
OPTIONS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "what is trained": [
        ("--model", "encoder or causal language model", {"metavar": "FOLDER|ID"}),
        ("--data", ".jsonl or .csv, see below", {"metavar": "FILE"}),
        ("--eval-data", "held-out rows (default: some of --data)", {"metavar": "FILE"}),
        (
            "--held-out",
            "rows of --data held out at random (default: a tenth, at most 1,000)",
            {"type": int, "metavar": "N"},
        ),
        ("--task", "auto, retrieval or language (default: by the model)", {}),
        (
            "--method",
            "may be repeated (default: ssb,lora,dora)",
            {"action": _Method, "metavar": "NAME[,NAME]"},
        ),
        (
            "-O --option",
            "option of the --method before it, such as r=16; may be repeated",
            {"action": _Option, "metavar": "KEY=VALUE", "dest": "method"},
        ),
        (
            "--lr",
            "of the --method before it, or of all where none is (default: the method's own)",
            {"action": _Rate, "metavar": "RATE"},
        ),
        (
            "--target-modules",
            "all-linear (default), names such as query,value, or a regular expression",
            {"metavar": "NAMES"},
        ),
        ("--exclude-modules", "names or a regular expression", {"metavar": "NAMES"}),
    ],
    "how": [
        ("--steps", "default: one epoch; the built-in example has its own", {"type": int}),
        ("--epochs", "in place of --steps", {"type": float}),
        ("--batch-size", "default: 32", {"type": int, "metavar": "ROWS"}),
        ("--weight-decay", "of matrices (default: 0)", {"type": float, "metavar": "RATE"}),
        ("--mpc", "pattern constraint on A and B in the loss: o or d", {"metavar": "KIND"}),
        ("--mpc-coef", "its weight (default: 0.1)", {"type": float, "metavar": "WEIGHT"}),
        ("--max-length", "texts are cut (default: 64)", {"type": int, "metavar": "TOKENS"}),
        ("--pooling", "of an encoder: mean or cls (default: mean)", {}),
        ("--base-dropout", "the base model's own dropout too", {"action": "store_true"}),
        ("--dtype", "of the base: float32, bfloat16 or float16 (default: float32)", {}),
        ("--device", "default: the first GPU, else the CPU", {}),
        ("--seed", "default: 0", {"type": int}),
        ("--threads", "of torch on the CPU (default: its own choice)", {"type": int}),
        (
            "--rounds",
            "of the timing, interleaved; 0 leaves it out (default: 12)",
            {"type": int, "metavar": "N"},
        ),
    ],
    "where": [
        ("--output", "default: runs/train", {"metavar": "FOLDER"}),
        ("--overwrite", "delete the job that is there first", {"action": "store_true"}),
        ("--resume", "go on with the job that is there", {"action": "store_true"}),
        ("--checkpoint-every", "default: 10", {"type": int, "metavar": "STEPS"}),
        ("--config", ".yaml or .json file with these options", {"metavar": "FILE"}),
    ],
}


if __name__ == "__main__":
    sys.exit(main())
