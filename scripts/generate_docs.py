"""Writes docs/api.md, docs/methods.md and docs/architecture.svg from the code; --check compares.

Edit docstrings, the methods' own declarations and scripts/layers.py, never the files themselves.
"""

import argparse
import inspect
import math
import sys
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import decomp_kernels as dk
from decomp_kernels import factors
from decomp_kernels.cli import methods
from decomp_kernels.methods import adalora, diff_pruning, lora_dash
from layers import LAYERS

ROOT = Path(__file__).parent.parent
MADE_BY = "<!-- written by scripts/generate_docs.py; run `make docs` -->"

# Of docs/architecture.svg: boxes side by side, and the width of a letter of 13 px at the most.
ACROSS, LETTER = 3, 7.0

API_HEAD = (
    "`import decomp_kernels as dk`; every name below is `dk.<name>`. "
    "The command line describes itself: `decomp-kernels --help`."
)
MAPS_HEAD = "The closed set of changes of a whole weight, in `decomp_kernels.factors`."
COMPANIONS_HEAD = "In the method's file, `decomp_kernels.methods.<file>`."
COMPANIONS = (
    adalora.RankAllocator,
    diff_pruning.l0_penalty,
    diff_pruning.fix_masks,
    lora_dash.select_directions,
)
METHODS_HEAD = (
    "Options with their defaults; PEFT's spellings (`lora_alpha`, ...) are accepted too. "
    "Formulas and counts in one table: [methods.md](methods.md)."
)


def api() -> str:
    """Every public name with its signature and its docstring."""
    method_classes = set(dk.methods().values())
    public = {
        name: value
        for name, value in vars(dk).items()
        if not name.startswith("_") and not inspect.ismodule(value) and callable(value)
    }
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    classes = {name: value for name, value in public.items() if name not in functions}
    parts = [
        f"# API\n\n{MADE_BY}\n\n{API_HEAD}\n\n## Functions\n",
        *(_entry(name, functions[name]) for name in sorted(functions)),
        "## Classes\n",
        *(
            _entry(name, value)
            for name, value in sorted(classes.items())
            if value not in method_classes
        ),
        f"## Weight maps\n\n{MAPS_HEAD}\n",
        *(_entry(cls.__name__, cls) for cls in factors.WeightMap.__subclasses__()),
        f"## Companions of single methods\n\n{COMPANIONS_HEAD}\n",
        *(
            _entry(f"{value.__module__.rpartition('.')[2]}.{value.__name__}", value)
            for value in COMPANIONS
        ),
        f"## Methods\n\n{METHODS_HEAD}\n",
        *(
            _entry(cls.__name__, cls)
            for cls in sorted(method_classes, key=lambda cls: cls.__name__)
        ),
    ]
    return "\n".join(parts)


def methods_table() -> str:
    """The registry as a table, as `decomp-kernels methods --markdown` prints it."""
    return methods.markdown().replace("\n", f"\n\n{MADE_BY}\n", 1)


def _entry(name: str, value: object) -> str:
    words = inspect.getdoc(value) or ""
    if is_dataclass(value) and words.startswith(f"{name}("):  # what @dataclass writes by itself
        words = ""
    if value in dk.methods().values():
        head = inspect.getdoc(sys.modules[value.__module__]) or ""
        words = "\n\n".join(part for part in (head, words) if part)
    text = [f"### {name}\n", f"```python\n{_signature(name, value)}\n```\n"]
    text.append(f"```text\n{words}\n```\n")
    for member_name, member in _members(value):
        text.append(f"```python\n{_signature(f'{name}.{member_name}', member)}\n```\n")
        text.append(f"```text\n{inspect.getdoc(member)}\n```\n")
    return "\n".join(text)


def _members(value: object) -> list[tuple[str, object]]:
    """Public functions that a class of ours describes; a method's own are in CONTRIBUTING.md."""
    if not inspect.isclass(value) or value in dk.methods().values():
        return []
    ours = [cls for cls in value.__mro__ if cls.__module__.startswith("decomp_kernels")]
    found = {name: member for cls in reversed(ours) for name, member in vars(cls).items()}
    return [
        (name, member)
        for name, member in found.items()
        if inspect.isfunction(member) and not name.startswith("_") and member.__doc__
    ]


def _signature(name: str, value: object) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"class {name}({value.__base__.__name__})"
    if is_dataclass(value):
        shown = [
            field.name if _required(field) else f"{field.name}={field.default!r}"
            for field in sorted(fields(value), key=lambda field: field.name == "impl")
        ]
        if any(field.kw_only for field in fields(value)):
            shown.insert(0, "*")
    else:
        shown = []
        for parameter in inspect.signature(value).parameters.values():
            starred = any(entry.startswith("*") for entry in shown)
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                shown.append("*")
            if parameter.name != "self":
                shown.append(str(parameter.replace(annotation=parameter.empty)))
    shown = [entry.replace("'", '"') for entry in shown]
    line = f"{name}({', '.join(shown)})"
    if len(line) <= 100:
        return line
    return f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"


def _required(field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def picture() -> str:
    """The layers as boxes, users at the top, with the arrows between them.

    A layer of more than ACROSS files takes several lines of boxes, and long words are wrapped.
    """
    width, gap, inner, margin = 860, 22, 8, 20
    shapes: list[str] = []
    top = margin
    for layer in reversed(LAYERS):
        if shapes:
            shapes.append(
                f'<path d="M {width / 2:.0f} {top} v {gap - 8}" stroke="#333" '
                'stroke-width="2" marker-end="url(#head)"/>'
            )
            top += gap
        boxes = list(layer.items())
        lines = math.ceil(len(boxes) / ACROSS)
        across = math.ceil(len(boxes) / lines)
        box_width = (width - 2 * margin - (across - 1) * inner) / across
        for line in range(lines):
            here = [
                (name, textwrap.wrap(words, max(int(box_width / LETTER), 1)))
                for name, words in boxes[line * across : (line + 1) * across]
            ]
            box_height = 34 + 16 * max(len(words) for _, words in here)
            for column, (name, words) in enumerate(here):
                left = margin + column * (box_width + inner)
                middle = left + box_width / 2
                shapes.append(
                    f'<rect x="{left:.0f}" y="{top}" width="{box_width:.0f}" '
                    f'height="{box_height}" rx="6" fill="#eef3fb" stroke="#4a6fa5"/>'
                    f'<text x="{middle:.0f}" y="{top + 21}" font-weight="bold">{escape(name)}'
                    "</text>"
                )
                shapes += [
                    f'<text x="{middle:.0f}" y="{top + 39 + 16 * number}" font-size="13">'
                    f"{escape(part)}</text>"
                    for number, part in enumerate(words)
                ]
            top += box_height + (inner if line < lines - 1 else 0)
    height = top + margin
    body = "\n".join(shapes)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
  width="{width}" height="{height}" font-family="sans-serif" font-size="15" text-anchor="middle">
<title>The layers of decomp_kernels: arrows point from a file to what it may import</title>
<defs>
<marker id="head" markerWidth="8" markerHeight="8" refX="2" refY="4" orient="auto"
  markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 Z" fill="#333"/></marker>
</defs>
<rect width="{width}" height="{height}" fill="white"/>
{body}
</svg>
"""


FILES = {"api.md": api, "methods.md": methods_table, "architecture.svg": picture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    stale = []
    for name, make in FILES.items():
        path, text = ROOT / "docs" / name, make()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"stale: docs/{', docs/'.join(stale)}; run `make docs` and commit the result")
    print(f"docs: {', '.join(FILES)} {'are current' if check else 'written'}")


if __name__ == "__main__":
    main()
