"""PEFT's adapter_config.json and adapter_model.safetensors on the disk.

The names of the two files are PEFT's, so a new pair cannot stand beside the old one: the old
configuration goes first and the new one comes last, and a crash leaves the new adapter or none.
"""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from decomp_kernels.interop.description import AdapterFileError, parse_json
from decomp_kernels.interop.own_folder import flush, flush_folder, read_text
from decomp_kernels.interop.tensor_file import decode, encode

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files hold.  Raises AdapterFileError where they are damaged."""
    config = parse_json(read_text(folder / CONFIG), CONFIG)
    if not isinstance(config, dict):
        raise AdapterFileError(f"{CONFIG} must hold an object, got {type(config).__name__}")
    return config, _tensors(folder)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """What translation.to_peft made."""
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    scratch = {name: folder / f".{secrets.token_hex(8)}.tmp" for name in (TENSORS, CONFIG)}
    try:
        with open(scratch[TENSORS], "xb") as file:
            for piece in encode(tensors, {"format": "pt"}):
                file.write(piece)
            flush(file)
        with open(scratch[CONFIG], "xb") as file:
            file.write(text.encode())
            flush(file)
        (folder / CONFIG).unlink(missing_ok=True)
        flush_folder(folder)
        for name, path in scratch.items():
            os.replace(path, folder / name)
            flush_folder(folder)
    except BaseException:
        for path in scratch.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if path.is_file():
        return decode(path.read_bytes())
    if (folder / _PICKLE).is_file():
        raise AdapterFileError(
            f"{folder} has {_PICKLE}, which is a pickle and can run any code when read; load it "
            "with PEFT where you trust it, and save it again: save_pretrained writes safetensors"
        )
    raise AdapterFileError(
        f"{folder} must hold {TENSORS} beside its {CONFIG}, and it does not; copy the whole folder"
    )
