"""Tables that a command writes into a document, between two marked lines."""

from pathlib import Path


def check_marked(path: Path, name: str) -> None:
    """Raise ValueError where the file has no place for a table of that name."""
    text = path.read_text()
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1 or text.index(last) < text.index(first):
        raise ValueError(f"{path} must have one line {first} and after it one line {last}")


def put_into(path: Path, name: str, table: str) -> None:
    """Replace what stands between the two lines of ``check_marked``."""
    check_marked(path, name)
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text().split(first)
    path.write_text(f"{before}{first}\n\n{table}\n\n{last}{rest.split(last)[1]}")
