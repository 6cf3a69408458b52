"""The command that measures a results file again, whole or one row of it."""

import shlex
from collections.abc import Sequence
from typing import Any

from decomp_kernels import dispatch
from decomp_kernels.bench import layers
from decomp_kernels.bench.tables import SHORT

SCRIPTS = {  # suites that are measured by a script of the source tree
    "accelerated-layers": "python benchmarks/accelerated_layers.py",
    "quantized-memory": "python benchmarks/quantized_memory.py",
}
DRAWN = ("cache_norm", "dropout", "dropout_mode")  # options of the layer suite's variants
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
    if suite == "model":
        return shlex.join(_model(content["rows"], protocol))
    if suite == "quality":
        return shlex.join(_quality(content["rows"], protocol))
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
    biases = {row["bias"] for row in rows}
    kinds = [name for name, has in (("no", False), ("yes", True)) if has in biases]
    words += ["--bias", *kinds] if biases != {False} else []
    words += _grid(rows)
    if "impls" in protocol:  # not in files of the first form
        all_of_them = protocol["impls"] == list(dispatch.CANDIDATES)
        words += [] if all_of_them else ["--impls", *(protocol["impls"] or ["auto"])]
    words += ["--compile"] if protocol.get("compile") else []
    words += ["--cold"] if protocol.get("cold") else []
    words += [] if protocol.get("peer", True) else ["--no-peer"]
    return words + _options(protocol, ("rank", *ASKED, "processes"))


def _grid(rows: Sequence[dict[str, Any]]) -> list[str]:
    """--dropout and --adapter-dtype where a row is not among those measured without them."""
    known = {(of, tuple(extra.items()), wide) for _, of, extra, wide in layers.VARIANTS}
    known |= {(row["method"], (), False) for row in rows}
    drawn = [{k: row["options"][k] for k in DRAWN if k in row["options"]} for row in rows]
    wide = [row["adapter_dtype"] != row["dtype"] for row in rows]
    if all(
        (row["method"], tuple(options.items()), each) in known
        for row, options, each in zip(rows, drawn, wide, strict=True)
    ):
        return []
    dropouts = sorted({options.get("dropout", 0.0) for options in drawn})
    kinds = [name for name, is_wide in (("base", False), ("float32", True)) if is_wide in wide]
    return ["--dropout", *(f"{p:g}" for p in dropouts), "--adapter-dtype", *kinds]


def _model(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    words = ["decomp-kernels", "bench", "model"]
    if rows:
        words += ["--methods", *dict.fromkeys(row["method"] for row in rows)]
        for name, size in rows[0]["size"].items():
            words += [f"--{name.replace('_', '-')}", str(size)]
        words += ["--targets", *rows[0]["targets"]]
        words += ["--dropout", *sorted({f"{r['options'].get('dropout', 0.0):g}" for r in rows})]
        words += ["--dtype", *dict.fromkeys(row["dtype"] for row in rows)]
        kinds = {"base" if row["adapter_dtype"] == row["dtype"] else "float32" for row in rows}
        words += ["--adapter-dtype", *sorted(kinds)]
        kinds = {row["checkpointing"] for row in rows}
        words += ["--checkpointing", "both" if len(kinds) > 1 else kinds.pop()]
    return words + _options(protocol, ("rank", "compile", *ASKED))


def _quality(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """Files of one's own are named by what they hold: --data takes their place."""
    words = ["decomp-kernels", "bench", "quality"]
    runs = [row for row in rows if row.get("kind") == "run" and row["group"] != "frozen"]
    if runs and "steps" in protocol:
        words += ["--methods", *dict.fromkeys(row["method"] for row in runs)]
        ranks = dict.fromkeys(str(row["budget"]) for row in runs if row.get("budget"))
        words += ["--rank", *ranks] if ranks else []
        words += ["--only-seeds", *map(str, sorted({row["seed"] for row in runs}))]
        words += _options(protocol, ("task", "lr"))
        for name in ("steps", "batch_size", "max_length", "mpc_coef"):
            words += [f"--{name.replace('_', '-')}", str(protocol[name])]
        words += ["--lr-search", "on" if protocol["lr_search"] else "off"]
        words += ["--base-dropout"] if protocol["base_dropout"] else []
    return words + _options(protocol, ASKED)


def _scale(rows: Sequence[dict[str, Any]], protocol: dict[str, Any]) -> list[str]:
    """Methods, axes and their sizes, and what does not grow, which the protocol has."""
    words = ["decomp-kernels", "bench", "scale", "--methods"]
    words += dict.fromkeys(row["method"] for row in rows)
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    words += ["--axes", *axes]
    for axis in axes:
        sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
        words += ["--sizes", f"{axis}={','.join(map(str, sizes))}"]
    words += ["--dtype", rows[0]["dtype"]]
    words += [] if protocol.get("peer", True) else ["--no-peer"]
    if "shape" in protocol:
        words += ["--shape", ",".join(map(str, protocol["shape"]))]
        return words + _options(protocol, ("rank", "layers", *ASKED))
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
