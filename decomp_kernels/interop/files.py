"""save_adapter and load_adapter: one adapter of a model in a folder, never a pickle.

    model  ->  Description, tensors  ->  our own two files, or PEFT's
    folder ->  Description, tensors  ->  checked against the model  ->  adapters in place

A format is a file that reads and writes a folder: own_folder.py, peft/folder.py.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from decomp_kernels.interop import own_folder
from decomp_kernels.interop.contents import contents
from decomp_kernels.interop.description import AdapterFileError, Description
from decomp_kernels.interop.installing import install
from decomp_kernels.interop.peft import folder as peft_folder
from decomp_kernels.interop.peft.names import BaseFacts, facts_of
from decomp_kernels.interop.peft.translation import Shapes, from_peft, to_peft
from decomp_kernels.linear import (
    Decomposed,
    decomposed_class,
    stand_in,
)
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
        write, made = peft_folder.write, to_peft(description, tensors, facts)
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
    folder: Path, shapes: Shapes | None = None
) -> tuple[Description, Callable[[], dict[str, Tensor]]]:
    """The adapter in ``folder``, whichever its format: its description, and what reads its tensors.

    shapes: (N, K) of the model's linears, where there is a model.
    """
    present = [name for name, file in FORMATS.items() if (folder / file).is_file()]
    if not present:
        # PEFT writes an adapter of another name than "default" into a folder of that name.
        inside = [path.parent for file in FORMATS.values() for path in folder.glob(f"*/{file}")]
        hint = f"; there is one in {min(inside)}" if inside else ""
        raise FileNotFoundError(
            f"{folder} must hold an adapter that save_adapter wrote, or PEFT, and there is no "
            f"{own_folder.JSON} in it and no {peft_folder.CONFIG}{hint}"
        )
    if len(present) > 1:
        raise AdapterFileError(
            f"{folder} must hold one adapter, and it has {' and '.join(FORMATS.values())}; "
            "keep one of them"
        )
    if present == ["peft"]:
        description, tensors = from_peft(*peft_folder.read(folder), shapes)
        return description, lambda: tensors
    return own_folder.read(folder)


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
    install(model, description, tensors, adapter_name, allow_other_base)
    return whole


def _shapes(model: nn.Module) -> Shapes:
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
