"""Rows of text from a JSONL or CSV file, checked: every complaint names the file and the line.

    retrieval   columns query, document            one pair of texts that belong together
    language    column  text                       learned as a whole
                columns prompt, completion         the completion alone is learned

Other columns are ignored.  JSONL is one object a line, CSV has a header line; both are UTF-8.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from decomp_kernels.cli.errors import BadInput

COLUMNS = {
    "retrieval": (("query", "document"),),
    "language": (("text",), ("prompt", "completion")),
}


def read_rows(path: Path, task: str) -> list[tuple[str, ...]]:
    """The wanted columns of every row, as tuples in the order of COLUMNS."""
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"--data must be a .jsonl or .csv file, got {path}")
    rows: list[tuple[str, ...]] = []
    columns: tuple[str, ...] | None = None
    try:
        for line, row in reader(path):
            if columns is None:
                columns = _columns(row, task, f"{path}, line {line}")
            rows.append(tuple(_text(row, column, f"{path}, line {line}") for column in columns))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} must be UTF-8 text: {error.reason}") from None
    if not rows:
        raise BadInput(f"{path} holds no rows")
    return rows


def _columns(row: dict, task: str, where: str) -> tuple[str, ...]:
    for columns in COLUMNS[task]:
        if all(column in row for column in columns):
            return columns
    wanted = " or ".join(" and ".join(repr(c) for c in columns) for columns in COLUMNS[task])
    found = ", ".join(map(repr, row)) or "none"
    raise BadInput(f"{where}: {task} data needs the columns {wanted}, got {found}")


def _text(row: dict, column: str, where: str) -> str:
    if column not in row:
        raise BadInput(f"{where}: the column {column!r} is missing")
    value = row[column]
    if not isinstance(value, str):
        raise BadInput(f"{where}: {column!r} must be text, got {value!r}")
    if not value.strip():
        raise BadInput(f"{where}: {column!r} is empty")
    return value


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                raise BadInput(f"{path}, line {line}: not valid JSON ({reason})") from None
            if not isinstance(row, dict):
                raise BadInput(
                    f"{path}, line {line}: must be a JSON object, got {text.strip()[:40]}"
                )
            yield line, row


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    raise BadInput(f"{where}: more fields than the header has columns")
                if None in row.values():
                    raise BadInput(f"{where}: fewer fields than the header has columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise BadInput(f"{path}, line {reader.reader.line_num}: {error}") from None
