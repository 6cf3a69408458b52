"""Tensors as the bytes of a safetensors file, and back: {name: tensor}  <->  header + data.

    8 bytes: length of the header | header: {name: {dtype, shape, data_offsets}} in JSON | data

Written by hand, tensor by tensor: the library's writer needs NumPy and a second copy of all data.
Read from bytes in memory, never mapped: the file may be replaced while its tensors are in use.
"""

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from decomp_kernels.interop.description import AdapterFileError
from decomp_kernels.interop.fingerprint import raw_bytes

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
FLOATING = ("float64", "float32", "float16", "bfloat16")
LARGEST_HEADER = 100_000_000  # the format's own limit


def dtype_name(dtype: torch.dtype) -> str:
    """As adapter.json spells it."""
    return str(dtype).removeprefix("torch.")


def check_writable(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in _NAMES:
        raise TypeError(
            f"{key} must be one of {', '.join(map(dtype_name, _NAMES))} to be saved, "
            f"got {dtype_name(tensor.dtype)}; convert it"
        )


def encode(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes]:
    """The file, in pieces.  Wide elements come first, so that each is aligned to its own size."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for key in order:
        tensor = tensors[key]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        yield raw_bytes(tensors[key].detach().cpu().contiguous())


def decode(data: bytes) -> dict[str, Tensor]:
    """Every tensor in memory of its own.  Raises AdapterFileError whatever the bytes are."""
    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise AdapterFileError(
            f"the tensor file is no safetensors file ({error}); copy it again, or save again"
        ) from None
    found = {}
    for key, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise AdapterFileError(
                f"{key!r} must be of type {', '.join(_DTYPES)}, got {entry['dtype']}"
            )
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if prod(shape) == 0:
            found[key] = torch.empty(shape, dtype=dtype)
        else:
            found[key] = torch.frombuffer(entry["data"], dtype=dtype).reshape(shape)
    return found
