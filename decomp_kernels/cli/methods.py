"""``decomp-kernels methods``: the registry as a table, or one method in its own words."""

import argparse
import inspect
import sys
from dataclasses import fields
from typing import Any

import decomp_kernels as dk
from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.text import aligned

HEADER = ("method", "W'", "trainable, a layer", "mergeable", "same function in PEFT", "paper")
DOCUMENT = (
    "method", "class", "W'", "trainable parameters of a layer", "mergeable",
    "same function in PEFT", "paper",
)  # fmt: skip
SIZES = "W [N, K] as in nn.Linear (N outputs, K inputs), r the rank."


def run(args: argparse.Namespace) -> int:
    if args.name is not None:
        print(one(args.name))
    elif args.markdown:
        print(markdown(), end="")
    else:
        short = [[*row[:3], row[3].partition(":")[0], *row[4:]] for row in rows()]
        print(f"{aligned([HEADER, *short])}\n\n{SIZES}")
        print("One method and its options: decomp-kernels methods NAME")
    return 0


def rows() -> list[list[str]]:
    """The cells of HEADER for each method of the registry, as plain text."""
    found = []
    for name, cls in _registry().items():
        why_not = cls().why_not_mergeable
        mergeable = "yes" if why_not is None else f"no: {why_not}"
        found.append([name, cls.formula, cls.trains, mergeable, cls.peft, cls.citation])
    return found


def markdown() -> str:
    """docs/methods.md, which `make docs` writes with this; its links are relative to docs/."""
    lines = [f"| {' | '.join(DOCUMENT)} |", "|---" * len(DOCUMENT) + "|"]
    for row in rows():
        name, formula, trains, mergeable, peft, paper = (c.replace("|", "\\|") for c in row)
        number = paper.removeprefix("arXiv:")
        if number != paper:
            paper = f"[{paper}](https://arxiv.org/abs/{number})"
        cls = _registry()[name].__name__
        link = f"[`{cls}`](api.md#{cls.lower()})"
        cells = [f"`{name}`", link, f"`{formula}`", f"`{trains}`", mergeable, peft, paper]
        lines.append(f"| {' | '.join(cells)} |")
    sizes = SIZES.replace("nn.Linear", "`nn.Linear`")
    return f"# Methods\n\n{sizes}\n\n" + "\n".join(lines) + "\n"


def one(name: str) -> str:
    """A method's file in its own words, and its options with their defaults."""
    known = _registry()
    if name not in known:
        raise BadInput(f"unknown method {name!r}; the methods are {', '.join(known)}")
    cls = known[name]
    head = inspect.getdoc(sys.modules[cls.__module__]) or ""
    options = [f"  {field.name} = {field.default!r}" for field in fields(cls)]
    return "\n".join([head, "", f"Options ({cls.__name__}):", *options])


def _registry() -> dict[str, Any]:
    return dk.methods()
