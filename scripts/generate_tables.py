"""Writes what README.md and docs/*.md show of benchmarks/results, and docs/gains.svg.

    <!-- results: cpu/layer.json; gains -->            a block: the file's tables, or the one named
    <!-- end of results -->
    <!-- figure: cpu/layer.json; dora; 512 x 2048 x 2048; bf16; ours -->1.15<!-- end -->

A block names files under benchmarks/results, then a table by its title, or ``gains`` (the headline
table), ``misses`` (where PEFT is faster) or ``goals``.  A figure names a file, cells that a line
has (or its table's title), and the column; exactly one line must have them.  Text between the marks
is never edited by hand; marks inside fenced code are left alone.  --check writes nothing.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from decomp_kernels.bench import gains, gains_picture, layer_tables, rerun, suites
from decomp_kernels.bench.tables import Table, headline

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results: ([^>]*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure: ([^>]*?) -->)([^<]*)(<!-- end -->)")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
MARKS = re.compile(r"<!-- (?:results|figure): |<!-- end of results -->|<!-- end -->")
PICTURE, PICTURE_OF = "docs/gains.svg", "cpu/layer.json"


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(path: Path, root: Path) -> str:
    """The document with every block and figure as the results have it now."""
    parts = FENCED.split(path.read_text(encoding="utf-8"))
    try:
        parts[::2] = [_filled(part, path, root) for part in parts[::2]]  # between them stands code
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return "".join(parts)


def _filled(text: str, path: Path, root: Path) -> str:
    left = MARKS.search(FIGURE.sub("", BLOCK.sub("", text)))
    if left:
        raise ValueError(
            f"{left[0]!r} must be one of a pair: see the head of {Path(__file__).name}"
        )
    text = BLOCK.sub(lambda m: f"{m[1]}\n{block(m[2], path, root)}\n\n{m[3]}", text)
    return FIGURE.sub(lambda m: f"{m[1]}{figure(m[2], root)}{m[4]}", text)


def block(spec: str, document: Path, root: Path) -> str:
    """Markdown of a block; where a file is missing, a line that says so."""
    names, _, what = (part.strip() for part in spec.partition(";"))
    paths = [root / "benchmarks/results" / name for name in names.split()]
    missing = [path for path in paths if not path.exists()]
    if missing:
        listed = ", ".join(path.relative_to(root).as_posix() for path in missing)
        return f"Not measured yet: there is no {listed}."
    contents = [suites.read(path) for path in paths]
    lines = []
    for path, content in zip(paths, contents, strict=True):
        link = Path(os.path.relpath(path, document.parent)).as_posix()
        where = headline({"protocol": {}, "commit": None} | content)
        lines.append(f"{where} ([{path.name}]({link})).")
    return "\n\n".join(["  \n".join(lines), *_shown(contents, what, root)])


def _shown(contents: list[dict[str, Any]], what: str, root: Path) -> list[str]:
    """The parts of a block, after the lines that say where its numbers are from."""
    content = contents[0] | {"rows": [row for one in contents for row in one.get("rows", [])]}
    if what == "gains":
        best = gains.shown(gains.gains(contents))
        if not best:
            raise ValueError("no row with a peer to make the headline table of")
        again = rerun.of_row(contents[0], max(best, key=lambda gain: gain.speed.median).row)
        return [*_table(gains.table(best)), f"One method of it again: `{again}`."]
    if what == "misses":
        return [gains.said(gains.gains(contents))]
    if what == "goals":
        goals = json.loads((root / "benchmarks/goals.json").read_text(encoding="utf-8"))
        return [layer_tables.against_goals(content["rows"], goals["goals"])]
    found = suites.tables(content)
    chosen = [table for table in found if not what or table.title == what]
    if not chosen:
        titles = ", ".join(repr(table.title) for table in found)
        raise ValueError(f"a block must name one of the tables {titles}, got {what!r}")
    parts = []
    for table in chosen:
        parts += ([] if what else [f"**{table.title}**"]) + _table(table)
    again = rerun.command(content)
    if again is not None and not what and content["suite"] != "layer":  # that names every method
        parts.append(f"Again: `{again}`.")
    return parts


def _table(table: Table) -> list[str]:
    """Its words and itself, unpadded: a changed figure changes one line of the document."""
    numeric = [
        all(re.match(r"[-+*(]*\d|$", line[i]) for line in table.lines)
        for i in range(len(table.header))
    ]
    lines = [table.header, *table.lines]
    text = ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]
    text.insert(1, "|" + "|".join("---:" if number else "---" for number in numeric) + "|")
    return [*([table.words] if table.words else []), "\n".join(text)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def figure(spec: str, root: Path) -> str:
    """The cell that a figure names: FILE; cell; cell; COLUMN."""
    name, *cells, column = (part.strip() for part in spec.split(";"))
    path = root / "benchmarks/results" / name
    if not path.exists():
        raise ValueError(f"the figure {spec!r} must name a file under benchmarks/results")
    content = suites.read(path)
    tables = suites.tables(content)
    if content["suite"] == "layer":
        tables.append(gains.table(gains.shown(gains.gains([content]))))
    found = [
        [
            line[table.header.index(column)].strip("*")
            for line in table.lines
            if set(cells) <= {table.title, *(cell.strip() for cell in line)}
        ]
        for table in tables
        if list(table.header).count(column) == 1
    ]
    most = max((len(lines) for lines in found), default=0)
    if most != 1 or len({text for lines in found for text in lines}) != 1:
        raise ValueError(
            f"the figure {spec!r} must be one line of {name}, got {most}: name more cells of its "
            "line, or a column's head as the table has it"
        )
    return next(lines[0] for lines in found if lines)


def picture(root: Path) -> str | None:
    """docs/gains.svg; None where its results are missing."""
    path = root / "benchmarks/results" / PICTURE_OF
    if not path.exists():
        return None
    content = suites.read(path)
    found = gains.shown(gains.gains([content]), gains.SHOWN)
    return gains_picture.picture(
        found, gains.table(found).words.partition(":")[0], headline(content)
    )


def made(root: Path) -> dict[str, str]:
    """Every file that this writes, by its name, as it must be."""
    found = {path.relative_to(root).as_posix(): filled(path, root) for path in documents(root)}
    drawn = picture(root)
    return found if drawn is None else found | {PICTURE: drawn}


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(argv).check
    try:
        texts = made(root)
    except ValueError as error:
        sys.exit(f"results in the documents: {error}")
    stale = [
        name
        for name, text in texts.items()
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != text
    ]
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}; run `make docs` and commit the result")
    for name in stale:
        (root / name).write_text(texts[name], encoding="utf-8")
    print(f"results in the documents: {len(texts)} files {'are current' if check else 'written'}")


if __name__ == "__main__":
    main()
