"""Results of a stage of gpu-check, written row by row, and the processes that make them."""

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from decomp_kernels.bench import record

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
SERIAL = [*PYTEST, "-p", "no:xdist"]
# Compiling is most of the tests' time on a GPU, and runs on the host's cores.
WORKERS = min(12, (os.cpu_count() or 1) - 2)
if find_spec("xdist") and WORKERS > 1:
    PYTEST += ["-n", str(WORKERS)]


class Rows:
    """A results file that is written after every row and goes on where it stopped."""

    def __init__(self, path: Path, suite: str, args: argparse.Namespace) -> None:
        self.path, self.suite = path, suite
        self.protocol = {
            "full": args.full,
            "dry": args.dry,
            "device": "cpu" if args.dry else "cuda",
        }
        self.all: list[dict[str, Any]] = record.read(path)["rows"] if path.exists() else []

    def has(self, name: str) -> bool:
        return any(row["name"] == name and "error" not in row for row in self.all)

    def add(self, row: dict[str, Any]) -> None:
        self.all = [old for old in self.all if old["name"] != row["name"]] + [row]
        record.write(self.path, record.document(self.suite, self.protocol, self.all))


def run(command: list[str], seconds: float, **settings: str) -> tuple[int, str]:
    """Exit status and output; 124 where the time ran out.  settings: environment variables."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, text=True, timeout=max(seconds, 1),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        return 124, out.decode() if isinstance(out, bytes) else out
    return done.returncode, done.stdout
