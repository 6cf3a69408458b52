"""The command that measures a results file again, whole or one row of it."""

import shlex
from collections.abc import Sequence
from typing import Any

from decomp_kernels.bench.tables import SHORT

SCRIPTS = {  # suites that are measured by a script of the source tree
    "accelerated-layers": "python benchmarks/accelerated_layers.py",
    "quantized-memory": "python benchmarks/quantized_memory.py",
}
ASKED = ("rounds", "threads", "clock", "device", "seed")  # options that every suite has


def command(content: dict[str, Any]) -> str | None:
    """The whole file; None where this version does not know its suite."""
    suite, protocol = content["suite"], content.get("protocol") or {}
    if suite in SCRIPTS:
        return SCRIPTS[suite]
    if suite == "native kernels":
        words = ["python", "benchmarks/native_kernels.py"]
        return shlex.join(words + _options(protocol, ("threads", "rounds")))
    if suite == "tune":
        where = ["--cpu"] if protocol.get("device") == "cpu" else []
        return shlex.join(["decomp-kernels", "tune", *where, *_options(protocol, ("rounds",))])
    if suite == "train":
        return _train(content["options"])
    if suite == "layer":
        return shlex.join(_layer(content["rows"], protocol))
    if suite == "scale":
        return shlex.join(_scale(content["rows"], protocol))
    if suite in ("model", "quality"):
        words = ["decomp-kernels", "bench", suite]
        words += _options(protocol, ("rank", "compile")) if suite == "model" else []
        return shlex.join(words + _options(protocol, ASKED))
    return None


def of_row(content: dict[str, Any], row: dict[str, Any]) -> str | None:
    """One row by itself, where its suite can be asked for one."""
    if content["suite"] == "scale":
        return shlex.join(_scale([row], content["protocol"]))
    if content["suite"] != "layer":
        return None
    return shlex.join(_layer([row], content["protocol"]))


def of_line(content: dict[str, Any], header: Sequence[str], line: Sequence[str]) -> str | None:
    """The command of the row that a line of the layer suite's tables shows; None where unclear."""
    if content["suite"] != "layer":
        return None
    cells = set(line)
    found = {
        of_row(content, row)
        for row in content["rows"]
        if {row["label"], SHORT[row["dtype"]], " x ".join(map(str, row["shape"]))} <= cells
    }
    return found.pop() if len(found) == 1 else None


def _layer(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """Every variant of a method is measured with it: its name is the closest that one can ask."""
    words = ["decomp-kernels", "bench", "layer", "--methods"]
    words += dict.fromkeys(row["method"] for row in rows)
    for shape in dict.fromkeys(",".join(map(str, row["shape"])) for row in rows):
        words += ["--shape", shape]
    words += ["--dtype", *dict.fromkeys(row["dtype"] for row in rows)]
    words += ["--bias"] if all(row["bias"] for row in rows) else []
    words += ["--compile"] if protocol.get("compile") else []
    return words + _options(protocol, ("rank", *ASKED, "processes"))


def _scale(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """Methods, axes and their sizes; what does not grow is told by one row by itself."""
    words = ["decomp-kernels", "bench", "scale", "--methods"]
    words += dict.fromkeys(row["method"] for row in rows)
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    words += ["--axes", *axes]
    for axis in axes:
        sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
        words += ["--sizes", f"{axis}={','.join(map(str, sizes))}"]
    words += ["--dtype", rows[0]["dtype"]]
    if len(rows) == 1:
        words += ["--shape", ",".join(map(str, rows[0]["shape"])), "--rank", str(rows[0]["r"])]
    return words + _options(protocol, ASKED)


def _train(options: dict[str, Any]) -> str:
    """The options that a job is most likely to have been given; the rest are defaults."""
    words = ["decomp-kernels", "train", "--method"]
    words.append(",".join(dict.fromkeys(method["name"] for method in options["method"])))
    for name in ("model", "data", "seed", "threads", "rounds"):
        if options.get(name) is not None:
            words += [f"--{name}", str(options[name])]
    return shlex.join(words)


def _options(protocol: dict[str, Any], names: Sequence[str]) -> list[str]:
    words = []
    for name in names:
        if protocol.get(name) is not None:
            words += [f"--{name}", str(protocol[name])]
    return words
