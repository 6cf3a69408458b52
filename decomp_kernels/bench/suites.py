"""Which tables and which picture show a results file: bench/<suite>_tables.py, found by its name.

A presentation is a module with ``tables(content) -> list[Table]`` and, where the suite has one,
``picture(content, path) -> None``.  A suite without a module is shown row by row, as JSON.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from decomp_kernels.bench.tables import Table, texts

FAMILY = "decomp_kernels."  # what the "format" of every results file begins with
NEEDED = ("suite", "date", "machine", "versions")


def read(path: Path) -> dict[str, Any]:
    """A results file of any suite; ValueError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a results file in JSON, got something else ({error}); write one with: "
            "decomp-kernels bench layer --output FILE"
        ) from None
    form = content.get("format") if isinstance(content, dict) else None
    if not str(form).startswith(FAMILY):
        raise ValueError(
            f"{path} must be a results file with a format {FAMILY}..., got {form!r}; write one "
            "with: decomp-kernels bench layer --output FILE"
        )
    missing = [name for name in NEEDED if name not in content]
    objects = [content.get(name) for name in NEEDED[2:]] + [content.get("protocol", {})]
    texts = [content.get(name) for name in NEEDED[:2]]
    whole = all(isinstance(each, dict) for each in objects)
    if missing or not whole or not all(isinstance(each, str) for each in texts):
        raise ValueError(
            f"{path} must have {', '.join(NEEDED)} (two texts, two objects; a protocol is one too),"
            f" got {', '.join(content)}; measure again"
        )
    return content


def presentation(suite: str) -> ModuleType | None:
    """The module that shows this suite; None where there is none."""
    name = suite.replace("-", "_").replace(" ", "_")
    if not name.isidentifier() or find_spec(f"decomp_kernels.bench.{name}_tables") is None:
        return None
    return import_module(f"decomp_kernels.bench.{name}_tables")


def tables(content: dict[str, Any]) -> list[Table]:
    """The suite's own tables; of an unknown suite its rows, one column a field.

    ValueError where the rows are not those that the suite writes.
    """
    module = presentation(content["suite"])
    if module is None:
        return [plain(content.get("rows") or [])]
    try:
        made: list[Table] = module.tables(content)
        texts(made)  # TypeError where a cell is no text
        return made
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the rows must be those that the suite {content['suite']!r} writes, got "
            f"{type(error).__name__}: {error}; measure again with this version"
        ) from error


def has_picture(content: dict[str, Any]) -> bool:
    return hasattr(presentation(content["suite"]), "picture")


def picture(content: dict[str, Any], path: Path) -> None:
    """Draw the suite's picture; only where ``has_picture``."""
    module = presentation(content["suite"])
    if module is None or not hasattr(module, "picture"):
        raise ValueError(f"the suite {content['suite']!r} has no picture")
    module.picture(content, path)


def plain(rows: Sequence[dict[str, Any]]) -> Table:
    """Fields as columns in the order in which they were first met, values as JSON."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_short(row[name]) if name in row else "" for name in header] for row in rows]
    words = "This suite has no tables of its own here; these are its rows."
    return Table("rows", header or ["no rows"], lines, words)


def _short(value: Any, most: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else f"{text[:most]} ..."
