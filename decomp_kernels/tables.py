"""Tables of choices: the tile a kernel runs with, the implementation that ``auto`` takes.

A table is a JSON file {"about": ..., "entries": [...]}; the first entry that fits is taken.  One
fits where its ``arch`` is the device's ("any" fits all), where every limit in its ``when``
({"M_max": 16, "r_max": 32}) holds, and where each kind that it names is that of the call
("adapter": "float32"; a kind that it does not name may be any).  ``measured`` says on which GPU,
with which versions and when, or is false where nobody has.

Tables come with the package (kernels/configs).  ``decomp-kernels tune`` writes tables of the same
names into the user's folder; their entries come first.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

FORMAT = "decomp_kernels.table/1"
IMPLEMENTATIONS = "implementations"  # the table that ``auto`` reads
STALE = "made for another version of decomp_kernels: run `decomp-kernels tune` again"


def first(
    name: str,
    arch: str,
    sizes: dict[str, int],
    *,
    able: Callable[[Entry], bool] = lambda entry: True,
    **kinds: str | bool,
) -> Entry:
    """The first entry of table ``name`` for these sizes and kinds on this architecture.

    able: whether the call at hand can do what an entry wants of it.
    """
    for entry in entries(name):
        at_home = entry["arch"] in (arch, "any")
        if at_home and fits(entry, **kinds) and holds(entry, sizes) and able(entry):
            return entry
    raise LookupError(f"configs/{name}.json has no entry for any size; its last must have none")


def fits(entry: Entry, **kinds: str | bool) -> bool:
    """Whether the entry is for calls of these kinds."""
    return all(entry.get(kind, value) == value for kind, value in kinds.items())


def width(float32: bool) -> str:
    """A dtype as tables have it."""
    return "float32" if float32 else "narrow"


def holds(entry: Entry, sizes: dict[str, int]) -> bool:
    """Whether every limit of the entry holds; a size that is not given is 0."""
    limits = entry["when"].items()
    return all(sizes.get(limit.removesuffix("_max"), 0) <= most for limit, most in limits)


def hidden(entry: Entry, earlier: list[Entry], arch: str) -> bool:
    """Whether one of the ``earlier`` entries is taken on ``arch`` wherever ``entry`` would fit."""
    kinds = ("operator", "adapter", "base", "dropout", "scaled")
    for other in earlier:
        as_wide = all(kind not in other or entry.get(kind) == other[kind] for kind in kinds)
        as_large = all(
            limit in entry["when"] and entry["when"][limit] <= most
            for limit, most in other["when"].items()
        )
        asks_more = other.get("config", {}).get("DESCRIPTORS", False)
        if other["arch"] in (arch, "any") and as_wide and as_large and not asks_more:
            return True
    return False


@cache
def entries(name: str) -> list[Entry]:
    """The user's entries of table ``name``, then the package's."""
    return [*_users(name), *shipped(name)]


def shipped(name: str) -> list[Entry]:
    return json.loads(_shipped_text(name))["entries"]


def fingerprint(name: str) -> str:
    """Of the package's own table: entries measured beside another one may name other tiles."""
    return hashlib.sha256(_shipped_text(name).encode()).hexdigest()[:16]


def user_folder() -> Path:
    """Where ``decomp-kernels tune`` writes unless told otherwise, and where tables are read."""
    return Path.home() / ".cache" / "decomp_kernels"


def write(folder: Path, name: str, made: list[Entry]) -> Path:
    """Write ``made`` as table ``name`` of ``folder``, whole or not at all; it is read from now on.

    Entries that are there already stay behind the new ones, but those that the new ones replace.
    """
    path = folder / f"{name}.json"
    kept = [] if not path.exists() else [e for e in _read(path, name) or [] if not _within(e, made)]
    content = {"format": FORMAT, "beside": fingerprint(name)}
    lines = ",\n  ".join(json.dumps(entry) for entry in [*made, *kept])
    text = f'{json.dumps(content)[:-1]},\n "entries": [\n  {lines}\n ]}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    entries.cache_clear()
    return path


@contextmanager
def trial(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Inside the block every call that reads table ``name`` gets ``config``."""
    found = entries(name)
    found.insert(0, {"arch": "any", "when": {}, "config": config, "measured": False})
    try:
        yield
    finally:
        found.pop(0)


def _within(old: Entry, made: list[Entry]) -> bool:
    """Whether a new entry answers for the same calls."""

    def call(entry: Entry) -> Entry:
        told = ("config", "forward", "backward", "measured")
        return {name: value for name, value in entry.items() if name not in told}

    return any(call(old) == call(new) for new in made)


def _shipped_text(name: str) -> str:
    return files("decomp_kernels.kernels").joinpath(f"configs/{name}.json").read_text()


def _users(name: str) -> list[Entry]:
    path = user_folder() / f"{name}.json"
    found = _read(path, name) if path.exists() else []
    if found is None:
        warnings.warn(f"{path} is not used: it was {STALE}", stacklevel=2)
    return found or []


def _sound(entry: Entry, name: str) -> bool:
    """Whether an entry has what its readers take from it; KeyError and the like also say no."""
    measured, known = entry["measured"], shipped(name)
    limits = {limit for other in known for limit in other["when"]} | {"M_max", "NK_max", "r_max"}
    limits |= {"scaled_max", "dropout_max"}
    sound = isinstance(entry["arch"], str)
    for limit, most in entry["when"].items():
        sound &= limit in limits and type(most) is int and most >= 0
    if measured is not False:
        sound &= all(isinstance(measured[what], str) for what in ("on", "date"))
    if name == IMPLEMENTATIONS:
        for direction in ("forward", "backward"):
            form = r"aten|(triton|native):(passes|fused)"
            sound &= re.fullmatch(form, entry[direction]) is not None
            relative = measured["relative"][direction] if "relative" in (measured or {}) else None
            if relative is not None:
                sound &= entry[direction] in relative and all(r > 0 for r in relative.values())
        return bool(sound)
    config = entry["config"]
    sound &= any(set(config) | {"maxnreg"} == set(o["config"]) | {"maxnreg"} for o in known)
    for what, size in config.items():
        sound &= isinstance(size, int) and size >= 0
        if what.startswith(("BLOCK_", "num_warps")):
            sound &= size > 0 and size & (size - 1) == 0
    return bool(sound)


def _read(path: Path, name: str) -> list[Entry] | None:
    """The entries of a user's table; None where they were made beside another table."""
    try:
        content = json.loads(path.read_text())
        beside, found = content["beside"], content["entries"]
        sound = content["format"] == FORMAT and all(_sound(entry, name) for entry in found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} must be a table that `decomp-kernels tune` wrote, and cannot be read as one; "
            "delete it, or run `decomp-kernels tune` again"
        )
    return found if beside == fingerprint(name) else None
