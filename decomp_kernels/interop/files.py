"""save_adapter and load_adapter: one adapter of a model as safetensors and JSON, never pickle.

    folder/adapter.json                      everything but the numbers, with sha256 of the other
    folder/adapter-<sha256>.safetensors      the numbers

The tensor file is named by what is in it, so writing a new one leaves the old one alone, and
renaming the new adapter.json into place is the one moment at which the new adapter takes over.
"""

import hashlib
import os
import re
import secrets
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop.contents import contents
from decomp_kernels.interop.description import (
    AdapterFileError,
    Description,
    bias_key,
    from_text,
    module_key,
    to_text,
)
from decomp_kernels.interop.fitting import Fitted, fit
from decomp_kernels.interop.tensor_file import LARGEST_HEADER, decode, dtype_name, encode
from decomp_kernels.linear import adapted_layers, check_adapter_name
from decomp_kernels.methods.base import Adapter
from decomp_kernels.model import check_can_add, put_adapters
from decomp_kernels.saved_modules import trained_copies
from decomp_kernels.sharding import has_shards, writes

_JSON = "adapter.json"
_LARGEST_JSON = 256 * 2**20
_OURS = re.compile(r"adapter-[0-9a-f]{16}\.safetensors|\.[0-9a-f]{16}\.tmp")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> None:
    """Write an adapter of ``model`` into ``folder``, which is made if need be.

    adapter_name: which one; None is the active one.  Saved are its tensors on every layer, the
    modules that are trained whole with it, trained biases, the method's options, and a fingerprint
    of the base.  A crash, a full disk or an exception leaves the adapter that was in the folder
    before, or the new one, and never a mixture.  One process at a time writes to a folder.

    A model in shards (FSDP2, tensor parallel, ZeRO-3): every rank calls this, as each tensor is
    gathered, and rank 0 writes.  Of a model that each rank has whole (DDP), call it on one rank.
    """
    model = _unwrapped(model)
    sharded = has_shards(model)
    description, tensors = contents(model, adapter_name)
    if sharded and not writes():
        return
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write(target, description, tensors)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the adapter could not be saved in {target}: {error.strerror or error}; "
            "what was there before is unchanged",
        ) from error


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    allow_other_base: bool = False,
) -> nn.Module:
    """Put the adapter in ``folder`` on ``model``, in place, and make it the active one.

    model: the base that the adapter was trained on; it may have other adapters.  adapter_name: a
    name for it; None is the name it was saved under.  allow_other_base: take a base with other
    values or another dtype, and convert the adapter to it.  It trains from here as after
    ``adapt``.  Raises AdapterFileError, and changes nothing, where the files are damaged or do not
    fit.  No random number is drawn.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    whole, model = model, _unwrapped(model)
    description = _read_description(Path(folder))
    name = description.adapter_name if adapter_name is None else adapter_name
    check_adapter_name(name)
    check_can_add(model, name, trains_biases=bool(description.biases))
    _check_free(model, name)
    fitted = fit(model, description, allow_other_base)
    values = _values(_read_tensors(Path(folder), description), fitted)
    adapters = _filled(fitted, values, description)
    for path, module in fitted.copies.items():
        module.load_state_dict({key: values[module_key(path, key)] for key in module.state_dict()})

    # From here on nothing can fail: everything is made.
    for bias, tensor in fitted.biases.items():
        tensor.copy_(values[bias_key(bias)])
    put_adapters(model, name, adapters, fitted.copies, list(fitted.biases))
    return whole


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile, which add a prefix
    to every name.
    """
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner: Any = model
    while isinstance(inner, parallel) or "_orig_mod" in getattr(inner, "_modules", {}):
        inner = inner.module if isinstance(inner, parallel) else inner._modules["_orig_mod"]
    return inner


def _write(folder: Path, description: Description, tensors: dict[str, Tensor]) -> None:
    """Tensors under a temporary name, then under their own; then the same for adapter.json."""
    scratch = folder / f".{secrets.token_hex(8)}.tmp"
    new = None
    try:
        digest: Any = hashlib.sha256()
        with open(scratch, "xb") as file:
            for piece in encode(tensors):
                digest.update(piece)
                file.write(piece)
            _flush(file)
        path = new = folder / _tensor_file(digest.hexdigest())
        os.replace(scratch, path)
        with open(scratch, "xb") as file:
            file.write(to_text(replace(description, sha256=digest.hexdigest())).encode())
            _flush(file)
        _flush_folder(folder)
        os.replace(scratch, folder / _JSON)
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
        _flush_folder(folder)
        for old in folder.iterdir():
            if _OURS.fullmatch(old.name) and old != path:
                old.unlink()


def _is_in_use(tensor_file: Path) -> bool:
    try:
        return from_text((tensor_file.parent / _JSON).read_bytes()).sha256[:16] in tensor_file.name
    except (OSError, AdapterFileError):
        return False


def _tensor_file(sha256: str) -> str:
    return f"adapter-{sha256[:16]}.safetensors"


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the renamings of this folder last; elsewhere than on POSIX a folder has no such call."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _read_description(folder: Path) -> Description:
    path = folder / _JSON
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must hold an adapter that save_adapter wrote, and there is no {_JSON} in it"
        )
    if path.stat().st_size > _LARGEST_JSON:
        raise AdapterFileError(
            f"{path} must be JSON of at most {_LARGEST_JSON} bytes, got {path.stat().st_size}; "
            "it is damaged: copy it again, or save the adapter again"
        )
    return from_text(path.read_bytes())


def _read_tensors(folder: Path, description: Description) -> dict[str, Tensor]:
    """The tensors that the description lists, each as listed; read whole, and the file closed."""
    path = folder / _tensor_file(description.sha256)
    if not path.is_file():
        raise AdapterFileError(
            f"{folder} must hold {path.name}, which its {_JSON} belongs to, and it does not; "
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
            f"{path.name} does not match the checksum in {_JSON}: it is damaged or was replaced; "
            "copy it again, or save the adapter again"
        )
    tensors = decode(data)
    found = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    if found != description.tensors:
        key = min(k for k, _ in found.items() ^ description.tensors.items())
        raise AdapterFileError(
            f"{path.name} must hold {key!r} as {description.tensors.get(key, 'absent')}, as its "
            f"{_JSON} says, got {found.get(key, 'absent')}; save the adapter again"
        )
    return tensors


def _check_free(model: nn.Module, name: str) -> None:
    for path, module in {**adapted_layers(model), **trained_copies(model)}.items():
        if name in getattr(module, "adapters", ()) or name in getattr(module, "copies", ()):
            raise ValueError(
                f"{path or 'the model'} already has an adapter {name!r}; load this one under "
                "another name: load_adapter(model, folder, adapter_name=...)"
            )


def _values(tensors: dict[str, Tensor], fitted: Fitted) -> dict[str, Tensor]:
    """The file's tensors where the model needs them, checked to be finite."""
    found = {}
    for key, place in fitted.places.items():
        tensor = tensors[key]
        dtype = tensor.dtype if tensor.dtype in place.dtypes else place.convert_to
        made = tensor.to(place.device, dtype, copy=True)
        if made.is_floating_point() and not torch.isfinite(made).all():
            raise AdapterFileError(
                f"{key} must be finite, and as {dtype_name(dtype)} it holds NaN or infinity; "
                "the file is damaged, or its numbers do not fit that dtype"
            )
        found[key] = made
    return found


def _filled(
    fitted: Fitted, values: dict[str, Tensor], description: Description
) -> dict[str, Adapter]:
    """The blank adapters with their values.  A shared tensor is one Parameter on all its layers."""
    parameters: dict[str, nn.Parameter] = {}
    for path, adapter in fitted.blanks.items():
        for name, blank in adapter.state_dict(keep_vars=True).items():
            key = description.key(path, name)
            owner_path, _, last = name.rpartition(".")
            owner: Any = adapter.get_submodule(owner_path)
            if isinstance(blank, nn.Parameter):
                if key not in parameters:
                    parameters[key] = nn.Parameter(values[key], requires_grad=blank.requires_grad)
                owner._parameters[last] = parameters[key]
            else:
                owner._buffers[last] = values[key]
        base = fitted.layers[path].base(path)
        adapter.initialized = True
        try:
            adapter.method.check_values(adapter, base)
        except ValueError as error:
            raise AdapterFileError(
                f"the file's tensors for {path or 'the model'} cannot be right: {error}"
            ) from None
        adapter.method.refresh(adapter, base)
        left = [n for n, t in (*adapter.named_parameters(), *adapter.named_buffers()) if t.is_meta]
        if left:
            raise AdapterFileError(
                f"{type(adapter.method).__name__} cannot be loaded: it keeps {left[0]!r} out of "
                "the file, and its refresh does not make it again"
            )
    return fitted.blanks
