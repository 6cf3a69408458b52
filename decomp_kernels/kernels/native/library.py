"""The native library of csrc/: loaded on first use, by nothing else.

It registers its operators in the namespace decomp_kernels_native when it is loaded.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
PATH = _FOLDER / "libdecomp_kernels_native.so"


@cache
def why_not_loaded() -> str | None:
    """None where the library is loaded; else what is missing."""
    if not PATH.exists():
        return f"the native library was not built ({missing().get('host kernels', 'see README')})"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


@cache
def record() -> dict[str, Any]:
    """What setup.py wrote: which parts it built, and why not the others."""
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else {"built": False, "missing": {}}


def missing() -> dict[str, str]:
    """Part: why it was not built."""
    return record()["missing"]


def has_cuda() -> bool:
    """Whether the library holds device kernels."""
    return bool(record().get("cuda_archs"))


def ops() -> Any:
    """The operators; RuntimeError where the library cannot be loaded."""
    if why := why_not_loaded():
        raise RuntimeError(why)
    return torch.ops.decomp_kernels_native


def build_info() -> dict[str, str] | None:
    """Compiler, architectures, CUTLASS, interface target; None where no such module was built.

    The module is for one version of Python, the library for all.
    """
    try:
        from decomp_kernels.kernels.native import build_info as module
    except ImportError:
        return None
    return module.build_info()
