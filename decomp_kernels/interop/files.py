"""save_adapter and load_adapter: one adapter of a model in a folder, never a pickle.

    model  ->  Description, tensors  ->  our own two files, or PEFT's
    folder ->  Description, tensors  ->  checked against the model  ->  adapters in place

A format is a file that reads and writes a folder: own_folder.py, peft/folder.py.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.interop import own_folder
from decomp_kernels.interop.contents import contents
from decomp_kernels.interop.description import (
    AdapterFileError,
    Description,
    bias_key,
    module_key,
)
from decomp_kernels.interop.fitting import Fitted, fit
from decomp_kernels.interop.peft import folder as peft_folder
from decomp_kernels.interop.peft.names import BaseFacts, facts_of
from decomp_kernels.interop.tensor_file import dtype_name
from decomp_kernels.linear import (
    Decomposed,
    adapted_layers,
    check_adapter_name,
    decomposed_class,
    stand_in,
)
from decomp_kernels.methods.base import Adapter
from decomp_kernels.model import check_can_add, put_adapters
from decomp_kernels.saved_modules import trained_copies
from decomp_kernels.sharding import has_shards, writes

FORMATS = {"decomp_kernels": own_folder.JSON, "peft": peft_folder.CONFIG}


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    format: str = "decomp_kernels",  # noqa: A002 - the word for it
) -> None:
    """Write an adapter of ``model`` into ``folder``, which is made if need be.

    adapter_name: which one; None is the active one.  Saved are its tensors on every layer, the
    modules that are trained whole with it, trained biases, the method's options, and a fingerprint
    of the base.  A crash, a full disk or an exception leaves the adapter that was in the folder
    before, or the new one, and never a mixture.  One process at a time writes to a folder.

    A model in shards (FSDP2, tensor parallel, ZeRO-3): every rank calls this, as each tensor is
    gathered, and rank 0 writes.  Of a model that each rank has whole (DDP), call it on one rank.

    format="peft" writes PEFT's adapter_config.json and adapter_model.safetensors, for its
    ``PeftModel.from_pretrained(base, folder)``; PEFT need not be installed.  Raises ValueError
    where PEFT has no such adapter.  These files have no fingerprint, and a crash in the middle of
    replacing them leaves the new adapter or none.
    """
    inner = _unwrapped(model)
    sharded = has_shards(inner)
    description, tensors = contents(inner, adapter_name)
    facts = facts_of(inner)
    if not sharded or writes():
        write_folder(Path(folder), description, tensors, format, facts)


def write_folder(
    target: Path,
    description: Description,
    tensors: dict[str, Tensor],
    format: str,  # noqa: A002
    facts: BaseFacts | None,
) -> None:
    """Write a described adapter; facts: of its base, for PEFT's format, where it is at hand."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    others = [file for name, file in FORMATS.items() if name != format and (target / file).exists()]
    if others:
        raise ValueError(
            f"{target} must hold no adapter of another format, and it has {others[0]}; "
            "choose another folder, or remove that adapter"
        )
    write: Any
    made: tuple[Any, ...]
    if format == "peft":
        write, made = peft_folder.write, peft_folder.as_peft(description, tensors, facts)
        left = "an adapter that was there before may be gone"
    else:
        write, made = own_folder.write, (description, tensors)
        left = "what was there before is unchanged"
    try:
        target.mkdir(parents=True, exist_ok=True)
        write(target, *made)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the adapter could not be saved in {target}: {error.strerror or error}; {left}",
        ) from error


def read_folder(
    folder: Path, shapes: peft_folder.Shapes | None = None
) -> tuple[Description, dict[str, Tensor]]:
    """The adapter in ``folder``, whichever its format.  shapes: as peft/folder.py takes them."""
    present = [name for name, file in FORMATS.items() if (folder / file).is_file()]
    if not present:
        raise FileNotFoundError(
            f"{folder} must hold an adapter that save_adapter wrote, or PEFT, and there is no "
            f"{own_folder.JSON} in it and no {peft_folder.CONFIG}"
        )
    if len(present) > 1:
        raise AdapterFileError(
            f"{folder} must hold one adapter, and it has {' and '.join(FORMATS.values())}; "
            "keep one of them"
        )
    return peft_folder.read(folder, shapes) if present == ["peft"] else own_folder.read(folder)


@torch.no_grad()
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    allow_other_base: bool = False,
) -> nn.Module:
    """Put the adapter in ``folder`` on ``model``, in place, and make it the active one.

    folder: of ``save_adapter``, or of PEFT (adapter_config.json); PEFT need not be installed.
    model: the base that the adapter was trained on; it may have other adapters.  adapter_name: a
    name for it; None is the name it was saved under, "default" in PEFT's files.  allow_other_base:
    take a base with other values or another dtype, and convert the adapter to it.  PEFT's files do
    not say what the base was: every base is taken that they fit.  It trains from here as after
    ``adapt``.  Raises AdapterFileError, and changes nothing, where the files are damaged or do not
    fit.  No random number is drawn.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    whole, model = model, _unwrapped(model)
    description, tensors = read_folder(Path(folder), _shapes(model))
    name = description.adapter_name if adapter_name is None else adapter_name
    check_adapter_name(name)
    check_can_add(model, name, trains_biases=bool(description.biases))
    _check_free(model, name)
    fitted = fit(model, description, allow_other_base)
    values = _values(tensors, fitted)
    adapters = _filled(fitted, values, description)
    for path, module in fitted.copies.items():
        module.load_state_dict({key: values[module_key(path, key)] for key in module.state_dict()})

    # From here on nothing can fail: everything is made.
    for bias, tensor in fitted.biases.items():
        tensor.copy_(values[bias_key(bias)])
    put_adapters(model, name, adapters, fitted.copies, list(fitted.biases))
    return whole


def _shapes(model: nn.Module) -> peft_folder.Shapes:
    """(N, K) of every linear of the model."""
    found = {}
    for name, module in model.named_modules():
        cls: Any = type(module) if isinstance(module, Decomposed) else decomposed_class(module)
        if cls is not None:
            shape = (
                (module if isinstance(module, Decomposed) else stand_in(module, cls))
                .base_weight()
                .shape
            )
            found[name] = (shape[0], shape[1])
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile, which add a prefix
    to every name.
    """
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    inner: Any = model
    while isinstance(inner, parallel) or "_orig_mod" in getattr(inner, "_modules", {}):
        inner = inner.module if isinstance(inner, parallel) else inner._modules["_orig_mod"]
    return inner


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
