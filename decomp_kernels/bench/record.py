"""A results file: what was measured, on which machine, with which versions, and the raw samples."""

import functools
import json
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from decomp_kernels.bench.machine import machine

FORMAT = "decomp_kernels.bench/1"
PARTS = {  # of a file, and of what kind each is
    "suite": str, "date": str, "commit": str | None, "machine": dict, "versions": dict,
    "protocol": dict, "rows": list,
}  # fmt: skip
DECIDING = ("torch", "triton", "peft", "transformers")  # a result is theirs as well as ours
PACKAGES = (
    "decomp_kernels", "torch", "triton", "peft", "transformers", "numpy",
    "bitsandbytes", "torchao", "axolotl", "unsloth",
)  # fmt: skip


def document(suite: str, protocol: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "suite": suite,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "protocol": protocol,
        "rows": rows,
    }


def check_place(path: Path) -> None:
    """Make the file's folder; raise OSError where no file can be written at ``path``."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write(path: Path, content: dict[str, Any]) -> None:
    """To a temporary name and renamed: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(_text(content))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _text(content: dict[str, Any]) -> str:
    """JSON with one line a row: a difference between two files is then read row by row."""
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in content["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def read(path: Path, suite: str | None = None) -> dict[str, Any]:
    """ValueError where the file is none that ``document`` made, or is of another suite."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} must be a results file of format {FORMAT!r}, got {found!r}; "
            f"write one with: decomp-kernels bench {suite or 'layer'} --output FILE"
        )
    wrong = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    if wrong or not all(map(_is_row, content["rows"])):
        raise ValueError(
            f"{path} must be a whole results file; its {' and '.join(wrong) or 'rows'} are missing "
            "or of another kind; measure again"
        )
    if suite is not None and content["suite"] != suite:
        raise ValueError(
            f"{path} must be a results file of bench {suite}, got one of {content['suite']!r}; "
            "name another file"
        )
    return content


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("commit"), str | None)


def check_same_place(content: dict[str, Any], path: Path) -> None:
    """ValueError where the file was measured on another processor, or GPU where that measured, or
    with other packages: a document made now would put its rows under the name of these.
    """
    here, made, there = machine(), versions(), content["machine"]
    on_gpu = str(content["protocol"].get("device", "cpu")).startswith("cuda")
    places = ("cpu", "gpus") if on_gpu else ("cpu",)
    was = {name: there.get(name) for name in places}
    was |= {name: content["versions"].get(name) for name in DECIDING}
    now = {name: here[name] for name in places} | {name: made.get(name) for name in DECIDING}
    for what in was:
        if was[what] != now[what]:
            raise ValueError(
                f"--resume needs the same machine and packages: {path} is of {_said(what, was)}, "
                f"this one is {_said(what, now)}; name another --output"
            )


def _said(what: str, found: dict[str, Any]) -> str:
    if what == "gpus":
        return ", ".join(map(str, found[what] or ["no GPU"]))
    return str(found[what]) if what == "cpu" else f"{what} {found[what] or 'missing'}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The git commit of the source tree this runs from, "+" added where files are changed.

    As it was at the first call, which a command makes before it measures: a checkout may move on
    while a long run goes on with the code that it has loaded.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "*.py", "csrc")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git on this machine: the version still names the code
    return head + ("+" if changed else "")


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()
