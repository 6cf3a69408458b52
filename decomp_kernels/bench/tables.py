"""What suites print: a table with its title, and one line on where its numbers come from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MIB = 2**20


class Table(NamedTuple):
    """Cells as text; ``words`` is what a reader must know of it, in a sentence or two."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: str = ""

    def markdown(self) -> str:
        """Padded, so that it reads in a terminal too."""
        return markdown(self.header, self.lines)


def texts(tables: Sequence[Table]) -> str:
    """Tables one under the other, each with its title and its words."""
    parts = (f"**{t.title}.** {t.words}".rstrip() + f"\n\n{t.markdown()}" for t in tables)
    return "\n\n".join(parts)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text(header), ruler, *map(text, lines)])


def headline(content: dict[str, Any]) -> str:
    """Machine, threads, rounds, versions, commit and date of a results file."""
    machine, protocol, versions = content["machine"], content["protocol"], content["versions"]
    on_gpu = str(protocol.get("device", "cpu")).startswith("cuda") and machine["gpus"]
    threads = protocol.get("threads", machine["threads"])
    parts = [machine["gpus"][0] if on_gpu else machine["cpu"], counted(threads, "thread")]
    if protocol.get("clock") == "cpu":
        parts.append("CPU time")
    if "rounds" in protocol:
        rounds = counted(protocol["rounds"], "round")
        processes = protocol.get("processes", 1)
        parts.append(rounds if processes == 1 else f"{rounds} x {processes} processes")
    parts += [f"{name} {versions[name]}" for name in ("torch", "peft") if name in versions]
    rows = content.get("rows")  # those that --resume kept may be older than the file
    of_rows = [row.get("commit") for row in rows] if isinstance(rows, list) else []
    commits = dict.fromkeys(filter(None, of_rows)) or {content["commit"] or "?": None}
    parts.append(f"commit {', '.join(one[:12] for one in commits)}")
    parts.append(content["date"][:10])
    return ", ".join(parts)


def spread_text(spread: Sequence[float]) -> str:
    """Median and quartiles: 1.06 [1.02, 1.09]."""
    median, q1, q3 = spread
    return f"{median:.2f} [{q1:.2f}, {q3:.2f}]"


def counted(number: int, word: str) -> str:
    """1 thread, 2 threads."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
