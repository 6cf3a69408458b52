"""The state of a training run in one file: safetensors, with the rest as JSON in its header.

Written to a temporary name, flushed to the disk and renamed: a kill at any moment leaves the old
file or the new one, whole.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from decomp_kernels.cli.errors import BadInput

KEY = "decomp_kernels.train"


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, metadata={KEY: json.dumps(facts)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts).  The tensors are copies with an allocation each, as those of a run are."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise unreadable(path, error) from None
    return tensors, facts


def unreadable(path: Path, reason: object) -> BadInput:
    return BadInput(
        f"{path} is no checkpoint to go on with ({reason}); delete it to train this method again"
    )


def write_bytes(path: Path, content: bytes) -> None:
    """All of ``content`` under ``path``, or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None
        if folder is not None:
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def training_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on, by name: adapters, optimizer, random generators."""
    state = {f"model/{name}": tensor for name, tensor in _trained(model).items()}
    for number, values in optimizer.state_dict()["state"].items():
        state |= {
            f"optimizer/{number}/{name}": torch.as_tensor(value) for name, value in values.items()
        }
    state["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state |= {f"random/cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


@torch.no_grad()
def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put a ``training_state`` back, in place."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    own, saved = _trained(model), parts["model"]
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
        raise ValueError("it is of another model or method")
    if "cpu" not in parts["random"]:
        raise ValueError("it has no state of the random generator")
    for name, tensor in own.items():
        tensor.copy_(saved[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, field = name.partition("/")
        state.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(parts["random"]["cpu"])
    cuda = [tensor for name, tensor in sorted(parts["random"].items()) if name != "cpu"]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """Adapters whole, buffers included, and whatever else trains; a shared tensor comes once."""
    training = {id(p) for p in model.parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = ".adapters." in f".{name}" or id(tensor) in training
        if isinstance(tensor, Tensor) and wanted and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
