"""Tables in a terminal: columns of equal width."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """The first row is the header; a ": " in its cells breaks it into two lines.

    numbers: all columns but the first stand to the right.
    """
    heads = [cell.split(": ", 1) for cell in rows[0]]
    above = [head[0] for head in heads]
    below = [head[1] if len(head) == 2 else "" for head in heads]
    lines = [above, *([below] if any(below) else []), *rows[1:]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(above))]
    texts = []
    for line in lines:
        cells = [
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append("  ".join(cells).rstrip())
    texts.insert(2 if any(below) else 1, "-" * max(map(len, texts)))
    return "\n".join(texts)
