"""Builds a file of tests/native into a library: kernels' own source, run by cuda_on_host.h."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Static arrays' bounds, misaligned vectors and overflow trap, and a trap is an error of the launch.
FLAGS = (
    "-std=c++20", "-O1", "-g0", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Werror", "-Wno-unknown-pragmas", "-fsanitize=bounds,alignment,signed-integer-overflow",
    "-fsanitize-undefined-trap-on-error", "-include", "cuda_on_host.h",
)  # fmt: skip
INCLUDES = (HERE, ROOT / "csrc" / "common", ROOT / "csrc" / "cuda")


def compiler() -> str:
    """The path of g++ for x86-64 or whatever this machine is; a skip where there is none."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++ on this machine, and these tests compile the kernels for the host")
    return found


def build(
    source: Path,
    library: Path,
    *,
    includes: Sequence[Path] = INCLUDES,
    flags: Sequence[str] = (),
    races: bool = False,
) -> ctypes.CDLL:
    """``source`` as a shared library.  Earlier folders of ``includes`` hide later ones.

    races: every load and store of the kernels is watched (emulator_races.h), and takes longer.
    """
    folders = [f"-I{folder}" for folder in includes]
    # The watching functions are the emulator's own: compiled for the sanitizer, linked without it.
    watched = ("-fsanitize=thread", "-fno-threadsafe-statics") if races else ()
    compiled = library.with_suffix(".o")
    gcc = compiler()
    for command in (
        [gcc, *FLAGS, *folders, *flags, *watched, "-c", str(source), "-o", str(compiled)],
        [gcc, "-shared", "-Wl,-Bsymbolic", str(compiled), "-o", str(library)],
    ):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[:4000]
    return ctypes.CDLL(str(library))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Calls a function that returns a message or nothing; tensors go as pointers."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    passed = [
        pointer(a) if a is None or isinstance(a, torch.Tensor)
        else ctypes.c_float(a) if isinstance(a, float)
        else ctypes.c_int64(a)  # an int parameter takes the low half of it
        for a in arguments
    ]  # fmt: skip
    message = function(*passed)
    if message is not None:
        raise EmulationError(message.decode())


class EmulationError(Exception):
    """What the emulator found wrong with a launch."""
