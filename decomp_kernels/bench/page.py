"""Results files as one self-contained HTML page: tables, pictures, and how to measure them again.

No request leaves the page: styles and the few lines of script stand in it, pictures are base64 or
inline SVG.  Everything that comes from a file is escaped.  Without the script tables do not sort,
and all else works.
"""

import base64
import json
import re
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from decomp_kernels.bench import gains, gains_picture, rerun, suites
from decomp_kernels.bench.tables import Table, headline

TITLES = {
    "layer": "One layer",
    "model": "A whole model",
    "scale": "How it grows",
    "quality": "What each method learns",
    "train": "A pretrained model, fine-tuned",
    "tune": "Implementations by size",
    "native kernels": "Host kernels",
    "quantized-memory": "Quantised bases",
    "accelerated-layers": "PEFT layers under accelerate",
}
WORDS = (
    "Ratios are to a frozen layer or model, taken inside a round: contenders run one after another "
    "in a random order, and the control, an identical second frozen one, shows the noise. Each "
    "section names its file, machine and commit, and the command that measures it again; a line "
    "of the layer suite shows its own under the pointer. Click a column's head to sort by it."
)
NUMBER = re.compile(r"^[\s*(]*[-+]?[\d,]*\.?\d")
BOLD, CODE = re.compile(r"\*\*(.+?)\*\*"), re.compile(r"`([^`]+)`")
ORDER = {suite: number for number, suite in enumerate(TITLES)}


class Shown(NamedTuple):
    """A results file and its name on the page."""

    name: str
    content: dict[str, Any]


def page(files: Sequence[Shown]) -> str:
    """The whole page; ValueError, with the file's name, where one has rows that are not its own."""
    files = sorted(files, key=_order)
    sections = [_section(number, file) for number, file in enumerate(files)]
    links = "".join(
        f'<li><a href="#file-{number}">{escape(_title(file))}</a> '
        f"<small>{escape(file.name)}</small></li>"
        for number, file in enumerate(files)
    )
    try:
        body = "\n".join([_gains(files), *sections])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        names = ", ".join(file.name for file in files if file.content["suite"] == "layer")
        raise ValueError(
            f"{names}: the rows must have positive times of each contender in each round, got "
            f"{type(error).__name__}: {error}; measure again"
        ) from error
    return PAGE.format(style=STYLE, script=SCRIPT, links=links, body=body, words=WORDS)


def _order(file: Shown) -> tuple[int, str]:
    """By suite; layer.json before layer-others.json."""
    return ORDER.get(file.content["suite"], len(ORDER)), Path(file.name).with_suffix("").as_posix()


def _title(file: Shown) -> str:
    return TITLES.get(file.content["suite"], str(file.content["suite"]))


def _gains(files: Sequence[Shown]) -> str:
    """The headline over the files of the layer suite that were measured alike."""
    contents = gains.alike(file.content for file in files)
    found = gains.gains(contents)
    best = gains.shown(found)
    if not best:
        return ""
    table = gains.table(best)
    where = headline(contents[0])
    drawn = gains.shown(found, gains.SHOWN) or best
    svg = gains_picture.picture(drawn, table.words.partition(":")[0], where)
    return f"""<section><h2>What a user gains</h2>
<p class="where">{escape(where)}</p>
<figure>{svg}</figure>
{_table(table)}
{_prose(gains.said(found))}</section>"""


def _section(number: int, file: Shown) -> str:
    """One file: where it comes from, how to measure it again, its picture and its tables."""
    content = file.content
    try:
        tables = suites.tables(content)
        where = headline({"protocol": {}, "commit": None} | content)
        shown = "".join(_table(table, content) for table in tables) + _again(content)
        picture = _picture(content)
        whole = rerun.command(content)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file.name}: {words}") from error
    command = "" if whole is None else f"<p>Again: <code>{escape(whole)}</code></p>"
    title = f"{escape(_title(file))} <small>{escape(Path(file.name).name)}</small>"
    return f"""<section id="file-{number}"><h2>{title}</h2>
<p class="where">{escape(where)}</p>
{command}
{_facts(file)}
{picture}
{shown}</section>"""


def _facts(file: Shown) -> str:
    """Machine, versions and protocol in full, folded away."""
    content = file.content
    groups = {"file": {"name": file.name, "format": content["format"], "date": content["date"]}}
    groups["file"]["commit"] = content.get("commit") or "unknown"
    groups |= {name: content.get(name) or {} for name in ("machine", "versions", "protocol")}
    items = "".join(
        f"<dt>{escape(group)}</dt><dd>"
        + ", ".join(f"{escape(name)} {escape(_value(value))}" for name, value in pairs.items())
        + "</dd>"
        for group, pairs in groups.items()
    )
    return f"<details><summary>machine, versions, protocol</summary><dl>{items}</dl></details>"


def _again(content: dict[str, Any]) -> str:
    """The command of every row, where rows can be measured by themselves."""
    commands = dict.fromkeys(rerun.of_row(content, row) for row in content.get("rows") or [])
    lines = "".join(f"<li><code>{escape(one)}</code></li>" for one in commands if one)
    if not lines:
        return ""
    words = "one command a row (the method's other variants come with it)"
    return f"<details><summary>{words}</summary><ol>{lines}</ol></details>"


def _picture(content: dict[str, Any]) -> str:
    if not suites.has_picture(content):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        suites.picture(content, path)
        data = base64.b64encode(path.read_bytes()).decode()
    name = escape(f"picture of the suite {content['suite']}", quote=True)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _table(table: Table, content: dict[str, Any] | None = None) -> str:
    """A line's title, where one command measures it again, is that command."""
    numeric = [any(NUMBER.match(line[i]) for line in table.lines) for i in range(len(table.header))]
    kinds = [" class=n" if number else "" for number in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_marked(cell)}</th>'
        for kind, cell in zip(kinds, table.header, strict=True)
    )
    lines = []
    for line in table.lines:
        command = None if content is None else rerun.of_line(content, table.header, line)
        title = "" if command is None else f' title="{escape(command, quote=True)}"'
        cells = "".join(
            f"<td{kind}>{_marked(cell)}</td>" for kind, cell in zip(kinds, line, strict=True)
        )
        lines.append(f"<tr{title}>{cells}</tr>")
    words = f"<p>{_marked(table.words)}</p>" if table.words else ""
    return f"""<h3>{escape(table.title)}</h3>{words}
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""


def _prose(text: str) -> str:
    return "".join(f"<p>{_marked(part)}</p>" for part in text.split("\n\n"))


def _marked(text: str) -> str:
    """Escaped; then Markdown's bold and code, which the tables' words may have."""
    text = BOLD.sub(r"<strong>\1</strong>", escape(text))
    return CODE.sub(r"<code>\1</code>", text)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#55606e;--paper:#fff;--line:#d5dae1;
--band:#f4f6f9;--link:#1f5fa8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#a9b2bd;--paper:#14181d;
--line:#343b45;--band:#1c2229;--link:#7ab1ee}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.5rem 1rem 4rem;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .6rem}
h2{font-size:1.3rem;margin:2.6rem 0 .2rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
p{margin:.5rem 0;max-width:60rem}a{color:var(--link)}small,.where,dt{color:var(--soft)}
h2 small{font-weight:normal;font-size:.7em}
.where{font-size:.9rem;margin:0 0 .6rem}
nav ul{padding-left:1.2rem;margin:.4rem 0}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere;background:var(--band);
padding:.1em .3em;border-radius:3px}
figure{margin:1rem 0;overflow-x:auto}figure svg,figure img{max-width:100%;height:auto}
figure img{background:#fff}
.scroll{overflow:auto;max-height:40rem;border:1px solid var(--line);border-radius:4px}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.28rem .6rem;text-align:left;white-space:nowrap}
td.n,th.n{text-align:right}
thead th{position:sticky;top:0;background:var(--band);border-bottom:1px solid var(--line)}
tbody tr:nth-child(even){background:var(--band)}
th[aria-sort]{cursor:pointer}th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--link)}
dl{margin:.4rem 0;font-size:.9rem}dt{margin-top:.4rem}dd{margin:0;overflow-wrap:anywhere}
ol{font-size:.9rem;padding-left:2.4rem}
@media (max-width:40rem){figure svg{min-width:40rem}h1{font-size:1.4rem}}
@media print{body{max-width:none}.scroll{max-height:none;overflow:visible}
table{font-size:.6rem}th,td{white-space:normal;padding:.1rem .25rem}thead th{position:static}
section{break-inside:auto}details{display:none}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const text = row.cells[i].textContent, found = text.match(/-?[\\d,]*\\.?\\d+/);
    return found && /^[\\s(]*[-+\\d]/.test(text) ? +found[0].replace(/,/g, "") : text;
  };
  heads.forEach((head, i) => {
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        return way * (typeof x === "number" ? x - y : x.localeCompare(y));
      }).forEach((row) => body.append(row));
    });
  });
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmarks of decomp_kernels</title>
<style>{style}</style></head>
<body>
<h1>Benchmarks of decomp_kernels</h1>
<p>{words}</p>
<nav><ul>{links}</ul></nav>
{body}
<script>{script}</script>
</body></html>
"""
