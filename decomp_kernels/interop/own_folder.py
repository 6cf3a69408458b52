"""Our own format: one adapter as adapter.json and a safetensors file that is named by its content.

    folder/adapter.json                      everything but the numbers, with sha256 of the other
    folder/adapter-<sha256>.safetensors      the numbers

Writing a new tensor file leaves the old one alone, and renaming the new adapter.json into place is
the one moment at which the new adapter takes over.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from decomp_kernels.interop.description import AdapterFileError, Description, from_text, to_text
from decomp_kernels.interop.tensor_file import LARGEST_HEADER, decode, dtype_name, encode

JSON = "adapter.json"
LARGEST_JSON = 256 * 2**20
_OURS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors|\.[0-9a-f]{16}\.tmp")


def read(folder: Path) -> tuple[Description, Callable[[], dict[str, Tensor]]]:
    """The description, and what reads the tensors: large, and in vain for another base.

    Both raise AdapterFileError where the two files are damaged or do not belong together.
    """
    description = from_text(read_text(folder / JSON))
    return description, partial(_read_tensors, folder, description)


def write(folder: Path, description: Description, tensors: dict[str, Tensor]) -> None:
    """Tensors under a temporary name, then under their own; then the same for adapter.json."""
    scratch = folder / f".{secrets.token_hex(8)}.tmp"
    new = None
    try:
        digest: Any = hashlib.sha256()
        with open(scratch, "xb") as file:
            for piece in encode(tensors):
                digest.update(piece)
                file.write(piece)
            flush(file)
        path = new = folder / _tensor_file(digest.hexdigest())
        os.replace(scratch, path)
        with open(scratch, "xb") as file:
            file.write(to_text(replace(description, sha256=digest.hexdigest())).encode())
            flush(file)
        flush_folder(folder)
        os.replace(scratch, folder / JSON)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
            # adapter.json names it where the same adapter was saved before, and where an interrupt
            # came just after the last renaming.
            if new is not None and not _is_in_use(new):
                new.unlink(missing_ok=True)
        raise
    # The new adapter is in place: what follows may fail without harm.
    with suppress(OSError):
        flush_folder(folder)
        for old in folder.iterdir():
            if _OURS.fullmatch(old.name) and old != path:
                old.unlink()


def _is_in_use(tensor_file: Path) -> bool:
    try:
        return from_text((tensor_file.parent / JSON).read_bytes()).sha256[:16] in tensor_file.name
    except (OSError, AdapterFileError):
        return False


def _tensor_file(sha256: str) -> str:
    return f"adapter-{sha256[:16]}.safetensors"


def flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make the renamings of this folder last; elsewhere than on POSIX a folder has no such call."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_text(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_JSON:
        raise AdapterFileError(
            f"{path} must be JSON of at most {LARGEST_JSON} bytes, got {path.stat().st_size}; "
            "it is damaged: copy it again, or save the adapter again"
        )
    return path.read_bytes()


def _read_tensors(folder: Path, description: Description) -> dict[str, Tensor]:
    """The tensors that the description lists, each as listed; read whole, and the file closed."""
    path = folder / _tensor_file(description.sha256)
    if not path.is_file():
        raise AdapterFileError(
            f"{folder} must hold {path.name}, which its {JSON} belongs to, and it does not; "
            "copy the whole folder, or save the adapter again"
        )
    widths = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
    most = (
        LARGEST_HEADER
        + 8
        + sum(widths.get(dtype, 2) * prod(shape) for dtype, shape in description.tensors.values())
    )
    if path.stat().st_size > most:
        raise AdapterFileError(
            f"{path.name} must have at most {most} bytes, got {path.stat().st_size}; "
            "it is damaged: copy it again, or save the adapter again"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != description.sha256:
        raise AdapterFileError(
            f"{path.name} does not match the checksum in {JSON}: it is damaged or was replaced; "
            "copy it again, or save the adapter again"
        )
    tensors = decode(data)
    found = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    if found != description.tensors:
        key = min(k for k, _ in found.items() ^ description.tensors.items())
        raise AdapterFileError(
            f"{path.name} must hold {key!r} as {description.tensors.get(key, 'absent')}, as its "
            f"{JSON} says, got {found.get(key, 'absent')}; save the adapter again"
        )
    return tensors
