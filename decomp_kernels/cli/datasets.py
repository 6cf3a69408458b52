"""The rows of a job: which are trained on, which are held out, and a hash that names them."""

import hashlib
import json
import platform
import random
from dataclasses import dataclass
from pathlib import Path

from decomp_kernels.cli import data_docstrings
from decomp_kernels.cli.data_files import read_rows
from decomp_kernels.cli.errors import BadInput

SPLIT_SEED = 0  # the job's own seed does not move the split: results of two seeds compare
MOST_HELD_OUT = 1000

Rows = list[tuple[str, ...]]


@dataclass
class Data:
    train: Rows
    held_out: Rows
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()


def gather(data: str | None, eval_data: str | None, held_out: int | None, task: str) -> Data:
    """Training and held-out rows; without ``eval_data`` rows are held out at random.

    data None is the standard library's docstrings.  held_out None is a tenth of a file's rows, at
    most MOST_HELD_OUT, and the built-in data's own number.
    """
    if data is None:
        if task != "retrieval":
            raise BadInput(f"the built-in data is for retrieval, not {task}; give --data")
        rows: Rows = list(data_docstrings.pairs())
        name = f"docstrings of Python {platform.python_version()}'s standard library"
        return _split(rows, held_out or data_docstrings.HELD_OUT, name)
    rows = read_rows(Path(data), task)
    if eval_data is not None:
        if held_out is not None:
            raise BadInput("give --eval-data or --held-out, not both")
        other = read_rows(Path(eval_data), task)
        if len(other[0]) != len(rows[0]):
            raise BadInput(f"{eval_data} must have the same columns as {data}")
        return Data(rows, other, Path(data).name)
    return _split(rows, held_out or min(max(1, len(rows) // 10), MOST_HELD_OUT), Path(data).name)


def _split(rows: Rows, held_out: int, name: str) -> Data:
    if len(rows) <= held_out:
        raise BadInput(
            f"{held_out} rows are to be held out, but the data has {len(rows)}; give more rows, "
            "a smaller --held-out, or --eval-data"
        )
    shuffled = random.Random(SPLIT_SEED).sample(rows, len(rows))
    return Data(shuffled[held_out:], shuffled[:held_out], name)
