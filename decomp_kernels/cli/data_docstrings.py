"""Text that is on every machine: (docstring, qualified name) of the standard library's functions.

    query     the docstring without the words of the name: "Return the longest common sub- of ..."
    document  the qualified name: "os.path.commonpath"

The sources are parsed, never imported or run.  Of functions with the same name or the same
docstring the first is kept, in the order of file and line: the data depend on the Python version
alone, and no held-out function is known from training under another docstring.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from decomp_kernels.cli.errors import BadInput

HELD_OUT = 600
LEAST_WORDS = 12  # of a query, after the name's words are gone
LEFT_OUT = {
    "__pycache__", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo",
}  # fmt: skip


def pairs(root: Path | None = None) -> list[tuple[str, str]]:
    """Every (query, document) of the library under ``root``, by default the running Python's."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found: dict[str, str] = {}
    names: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some distributions keep a template or a Python 2 file there
            continue
        for name, text in _docstrings(tree, module):
            query = without_name(text, name)
            if len(query.split()) >= LEAST_WORDS and name not in names:
                names.add(name)
                found.setdefault(query, name)
    if len(found) < 2 * HELD_OUT:
        raise BadInput(
            f"the built-in task needs the sources of Python's standard library, but {root} has "
            f"only {len(found)} documented functions; give --data"
        )
    return list(found.items())


def without_name(text: str, name: str) -> str:
    """``text`` on one line, without any word of the qualified ``name`` and its parts."""
    words = {word.lower() for word in re.split(r"\W+|_", name)}
    words |= {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}
    kept = (piece for piece in re.split(r"(\W+|_)", text) if piece.lower() not in words)
    return " ".join("".join(kept).split())


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in getattr(node, "body", []):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        text = ast.get_docstring(child)
        if text:
            yield name, text
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, name)
