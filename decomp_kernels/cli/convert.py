"""``decomp-kernels convert``: an adapter's files in PEFT's format, in ours, or as plain LoRA."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from decomp_kernels.cli.errors import BadInput, need, one_line
from decomp_kernels.cli.models import source_of
from decomp_kernels.cli.text import aligned
from decomp_kernels.interop.conversion import KINDS, convert
from decomp_kernels.interop.files import FORMATS, read_folder
from decomp_kernels.interop.lowrank import LoRAReport

DESCRIPTION = """\
Write the adapter in SOURCE into TARGET: in PEFT's format, in that of decomp_kernels, or as plain
LoRA (in PEFT's format), which other programs serve.  The format of SOURCE is seen from its files.
As LoRA exactly, or not at all; with --rank, as the nearest update of that rank, with its error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the adapter's folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the new folder")
    parser.add_argument("--to", required=True, choices=KINDS, help="what TARGET will hold")
    parser.add_argument(
        "--base", metavar="FOLDER|ID",
        help="the pretrained model: its fingerprint, names and task get into the files, and "
        "updates can be made that depend on its values",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=int, metavar="N",
        help="with --to lora: where the update is not exactly a LoRA of at most this rank, the "
        "nearest one that is",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter in TARGET")


def run(args: argparse.Namespace) -> int:
    if args.rank is not None and args.to != "lora":
        raise BadInput("--rank is for --to lora")
    if args.source.resolve() == args.target.resolve():
        raise BadInput("SOURCE and TARGET must be two folders")
    there = [file for file in FORMATS.values() if (args.target / file).exists()]
    if there and not args.overwrite:
        raise BadInput(f"{args.target} has an adapter ({there[0]}); --overwrite replaces it")
    try:
        base = None if args.base is None else _base(args.base, _dtype(args.source))
        report = convert(args.source, args.target, args.to, base, args.rank)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise BadInput(one_line(error)) from None
    if report is not None:
        print(_table(report))
    print(f"wrote {args.target}")
    return 0


def _table(report: LoRAReport) -> str:
    rows = [[path, str(layer.rank), f"{layer.error:.3e}"] for path, layer in report.items()]
    rows.append(["all", "", f"{report.error:.3e}"])
    return aligned([("layer", "rank", "relative error of the update"), *rows])


def _dtype(source: Path) -> str:
    """Of the base that the adapter was trained on; "auto", as the model was saved, if unknown."""
    description, _ = read_folder(source)
    records = [record for _, record in description.layers.values() if record is not None]
    return records[0].dtype if records else "auto"


def _base(name: str, dtype: str) -> nn.Module:
    """In the class that it was saved as."""
    transformers = need("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source, local = source_of(name, "--base")
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        kinds = getattr(config, "architectures", None) or ["AutoModel"]
        cls: Any = getattr(transformers, kinds[0], transformers.AutoModel)
        model = cls.from_pretrained(source, dtype=dtype, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(f"cannot load the model {name}: {one_line(error)}") from None
    return model.eval()
