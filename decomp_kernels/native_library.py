"""The native library of csrc/: what was built of it, and loading it on first use.

Loaded, it registers its operators in the namespace decomp_kernels_native.  Beside it stands the
library of csrc/autograd, with one operator that is its own autograd node; that one serves no other
PyTorch than the one it was built with.
"""

import json
import re
import sysconfig
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent / "kernels" / "native"
PATH = _FOLDER / "libdecomp_kernels_native.so"
AUTOGRAD = "libdecomp_kernels_autograd.so"
OPERATORS = (
    "cpu_level", "cpu_has_matrix_tiles", "down_projection", "column_walk", "up_expansion",
    "fused_forward", "fused_input_gradient", "squared_rows", "row_norm_fwd", "row_norm_bwd",
    "merged_weight", "gram_fwd", "gram_bwd", "dequantize", "block_rotate", "block_rotate_bwd",
    "sampled_products", "scattered_sum",
)  # fmt: skip
AUTOGRAD_ARGUMENTS = (
    "x", "weight", "bias", "down", "up", "core", "in_scale", "out_scale", "seed", "scale",
    "dropout", "passes",
)  # fmt: skip


@cache
def why_not_loaded() -> str | None:
    """None where the library is loaded; else what is missing."""
    if not PATH.exists():
        why = missing().get("host kernels", "pip install --no-build-isolation . builds it")
        return f"the native library was not built ({why})"
    if record().get("bytes") != PATH.stat().st_size:  # a library that was cut ends the process
        return f"{PATH.name} is not the one that was built: build it again"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the native library does not load: {error}"
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.decomp_kernels_native, name)]
    if lacking:
        return f"{PATH.name} is of another version, without {lacking[0]}: build it again"
    return None


@cache
def why_not_autograd() -> str | None:
    """None where the library of csrc/autograd is loaded; else what is missing."""
    path = PATH.with_name(AUTOGRAD)
    if not path.exists():
        why = missing().get("autograd node", "pip install --no-build-isolation . builds it")
        return f"the compiled autograd node was not built ({why})"
    if (built := record().get("torch")) != torch.__version__:
        return f"{path.name} is for PyTorch {built}, and this is {torch.__version__}: build again"
    if record().get("autograd_bytes") != path.stat().st_size:
        return f"{path.name} is not the one that was built: build it again"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if not hasattr(torch.ops.decomp_kernels_autograd, "decomposed_linear"):
        return f"{path.name} is of another version: build it again"
    schema = torch.ops.decomp_kernels_autograd.decomposed_linear.default._schema
    if tuple(argument.name for argument in schema.arguments) != AUTOGRAD_ARGUMENTS:
        return f"{path.name} is of another version: build it again"
    return None


@cache
def autograd_node() -> Any:
    """The operator decomposed_linear of csrc/autograd; None where it is not there."""
    if why_not_autograd():
        return None
    return torch.ops.decomp_kernels_autograd.decomposed_linear.default


@cache
def record() -> dict[str, Any]:
    """What setup.py wrote: which parts it built, and why not the others; {} where none is sound."""
    try:
        found = json.loads((_FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def missing() -> dict[str, str]:
    """Part: why it was not built."""
    return record().get("missing") or {}


def why_not_on_gpu(capability: tuple[int, int]) -> str | None:
    """Why there is no code for a GPU of this compute capability; None where there is."""
    archs: list[str] = record().get("cuda_archs") or []
    if not archs:
        return f"it holds no device kernels ({missing().get('device kernels', 'not built')})"
    major, minor = capability
    for arch in archs:
        digits = re.sub(r"\D", "", arch)
        built = int(digits[:-1]), int(digits[-1])
        exact = arch.endswith("a")  # such code runs on that GPU alone
        later = built <= capability and (built[0] == major or arch.endswith("+PTX"))
        if built == capability or (later and not exact):
            return None
    return f"it was built for {', '.join(archs)} and this GPU is sm_{major}{minor}"


@cache
def cpu_level() -> str | None:
    """The instruction set that host kernels use here, as csrc/cpu/levels.h names it."""
    return None if why_not_loaded() else str(ops().cpu_level())


@cache
def cpu_architecture() -> str | None:
    """The level as tables of measurements name it: beside matrix tiles (AMX), which the library's
    bf16 products use, it is another machine.
    """
    level = cpu_level()
    return f"{level}+amx" if level and ops().cpu_has_matrix_tiles() else level


def set_cpu_level(name: str) -> None:
    """Take a lower instruction set, or the best again; RuntimeError where there is none such."""
    ops().set_cpu_level(name)
    cpu_level.cache_clear()
    cpu_architecture.cache_clear()


def ops() -> Any:
    """The operators; RuntimeError where the library cannot be loaded."""
    if why := why_not_loaded():
        raise RuntimeError(why)
    return torch.ops.decomp_kernels_native


def build_info() -> dict[str, str] | None:
    """Compiler, architectures, CUTLASS, interface target; None where the module is not there.

    The module is for one version of Python, the library for all.
    """
    path = _FOLDER / f"build_info{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    spec = spec_from_file_location("build_info", path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module.build_info()
