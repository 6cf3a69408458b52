"""Measured tables: what tune makes of ratios, and its whole course in Triton's interpreter."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from decomp_kernels import dispatch, tables
from decomp_kernels.bench import tiles, tune
from decomp_kernels.bench.tune import Cell
from decomp_kernels.cli.inspect import LIMITS
from decomp_kernels.cli.main import main

ROOT = Path(__file__).parent.parent
WHERE = {"on": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-21"}


def row(cell, **medians):
    """A measured cell; medians: implementation = (forward, backward), quartiles 1 % around."""
    ratios = {
        impl.replace("_", ":"): {
            direction: {"median": m, "q1": 0.99 * m, "q3": 1.01 * m}
            for direction, m in zip(tune.DIRECTIONS, both, strict=True)
        }
        for impl, both in medians.items()
    }
    fields = ("M", "N", "K", "r", "dropout", "wide_adapter", "dtype", "scaled", "label")
    return {name: getattr(cell, name) for name in fields} | {"ratio": ratios, "failed": {}}


def test_library_calls_stay_where_nothing_is_surely_faster():
    cell = Cell(512, 4096, 4096, 16)
    for passes, expected in ((1.0, "triton:passes"), (1.092, "aten"), (1.085, "aten")):
        measured = row(cell, aten=(1.1, 1.1), triton_passes=(passes, passes))
        assert tune.fastest(measured, "forward") == expected
    with pytest.raises(RuntimeError, match="library calls failed at 512 x 4096 x 4096, r=16"):
        tune.fastest(row(cell, triton_passes=(1, 1)) | {"failed": {"aten": "boom"}}, "forward")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    tables.entries.cache_clear()
    dispatch.measured_choice.cache_clear()


def test_each_call_gets_the_nearest_measured_size_above_it(folder):
    fast, slow = {"triton_passes": (0.8, 1.2)}, {"triton_passes": (1.2, 0.8)}
    rows = [
        row(Cell(512, 4096, 4096, 16), aten=(1, 1), **slow),
        row(Cell(16, 4096, 4096, 16), aten=(1, 1), **fast),
        row(Cell(512, 4096, 4096, 64), aten=(1, 1), **fast),
        row(Cell(512, 4096, 4096, 16, dropout=0.05), aten=(1, 1), triton_passes=(0.5, 0.5)),
        row(Cell(512, 4096, 4096, 16, wide_adapter=True), aten=(1, 1), triton_passes=(2, 2)),
    ]
    tables.write(folder, tables.IMPLEMENTATIONS, tune.entries(rows, "sm_90", WHERE))

    def found(M, NK, r, adapter="narrow", dropout=False, arch="sm_90"):
        work = ("decomposed_linear", "forward", M, NK, r, "narrow", adapter, dropout)
        choices = [
            dispatch.measured_choice(arch, dispatch.Work(work[0], direction, *work[2:])).impl
            for direction in tune.DIRECTIONS
        ]
        return tuple(choice.removeprefix("triton:") for choice in choices)

    square = 4096 * 4096
    assert found(16, square, 16) == found(1, 100, 0) == ("passes", "aten")
    assert found(17, square, 16) == found(512, square, 16) == ("aten", "passes")
    assert found(512, square, 17) == found(300, square, 64) == ("passes", "aten")
    assert found(512, square, 16, dropout=True) == ("passes", "passes")
    assert found(512, square, 16, adapter="float32") == ("aten", "aten")
    for beyond in ((513, square, 16), (512, square + 1, 16), (512, square, 65)):
        assert found(*beyond) == ("aten", "aten")
    assert found(512, square, 64, arch="sm_80") == ("aten", "aten")


def test_fewer_entries_say_the_same(folder):
    choices = itertools.product((16, 128, 512), (1024, 2048), (16, 64), (False, True))
    random.seed(0)
    rows = [
        row(Cell(M, size, size, r, scaled=scaled), aten=(1, 1),
            native_passes=(random.choice((0.8, 1.2)), random.choice((0.8, 1.2))))
        for M, size, r, scaled in choices
    ]  # fmt: skip
    made = tune.entries(rows, "avx2", WHERE)
    shorter = tune.fewer(made)
    assert 0 < len(shorter) < len(made)
    found = []
    for some in (made, shorter):
        tables.write(folder, tables.IMPLEMENTATIONS, some)
        forget()
        asked = itertools.product((1, 16, 17, 600), (10, 2**20, 2**21), (0, 16, 17), (False, True))
        found.append([
            dispatch.measured_choice("avx2", dispatch.Work(
                "decomposed_linear", direction, M, NK, r, "narrow", "narrow", False, scaled)).impl
            for M, NK, r, scaled in asked for direction in tune.DIRECTIONS
        ])  # fmt: skip
        (folder / "implementations.json").unlink()
        forget()
    assert found[0] == found[1]


def test_shapes_that_the_table_cannot_tell_apart_take_what_none_loses_by():
    rows = [
        row(Cell(512, 14336, 4096, 16), aten=(1, 1), triton_passes=(0.8, 0.8)),
        row(Cell(512, 4096, 14336, 16), aten=(1, 1), triton_passes=(0.9, 1.1)),
    ]
    (entry,) = tune.entries(rows, "sm_90", WHERE)
    assert entry["forward"] == "triton:passes" and entry["backward"] == "aten"
    relative = entry["measured"]["relative"]
    assert relative["forward"] == {"aten": 1.25, "triton:passes": 1.0}
    assert relative["backward"] == {"aten": 1.0, "triton:passes": 1.1}
    (unmeasured,) = tune.entries(rows, "sm_90", None)
    assert unmeasured["measured"] is False


def test_neighbours_differ_by_one_step_and_stay_in_range():
    config = {"BLOCK_M": 16, "BLOCK_N": 256, "SHARES": 1, "num_warps": 4, "num_stages": 2}
    found = list(tiles.neighbours(config))
    changed = [{k: v for k, v in one.items() if v != config[k]} for one in found]
    assert changed == [
        {"BLOCK_M": 32}, {"BLOCK_N": 128}, {"SHARES": 2}, {"num_warps": 2}, {"num_warps": 8},
        {"num_stages": 1}, {"num_stages": 3}, {"num_stages": 4},
    ]  # fmt: skip


@pytest.mark.parametrize("kernel", tiles.kernels())
def test_a_tile_that_is_wrong_or_fails_is_dropped(kernel, monkeypatch):
    """Three neighbours, each seeming faster: one doubles the result, one raises, one is right."""
    present = tables.shipped(kernel)[-1]["config"]
    wrong, broken, right = ({**present, "num_stages": stages} for stages in (11, 12, 13))
    monkeypatch.setattr(
        tiles, "neighbours", lambda config: [wrong, broken, right] if config == present else []
    )
    original, ticks = tiles.kernels()[kernel], [0]
    entries = [{"arch": "any", "when": {}, "measured": False, "config": present}]
    monkeypatch.setattr(tables, "entries", lambda name: entries)

    def spoiled(cell, device):
        run = original(cell, device)

        def call():
            chosen = entries[0]["config"]
            if chosen == broken:
                raise RuntimeError("out of resources")
            ticks[0] += 300 if chosen == present else 100
            return [2 * t if chosen == wrong else t for t in tiles._flat(run())]

        return call

    monkeypatch.setattr(tiles, "kernels", lambda: {kernel: spoiled})
    monkeypatch.setattr(tiles.engine, "device_clock", lambda device: lambda: ticks[0])
    until = time.monotonic() + 60
    found = tiles.tune(kernel, Cell(5, 20, 24, 3), torch.device("cpu"), rounds=1, until=until)
    assert found["tried"] == 4 and found["failed"] == 1
    assert found["config"] == right and found["gain"] == 3.0


def test_a_faster_tile_becomes_an_entry(monkeypatch, folder):
    """On a clock that goes three times as far in a run of any tile but one."""
    cell, device = Cell(5, 20, 24, 3), torch.device("cpu")
    now = tables.shipped("up_expansion")[0]["config"]
    better = {**now, "BLOCK_C": 2 * now["BLOCK_C"]}
    monkeypatch.setattr(tiles, "neighbours", lambda config: [] if config == better else [better])
    original, ticks = tiles.kernels()["up_expansion"], [0]

    def ticking(cell, device):
        run = original(cell, device)

        def call():
            at = {"M": 5, "r": 3}
            chosen = tables.first("up_expansion", "any", at, adapter="narrow")["config"]
            ticks[0] += 100 if chosen == better else 300
            return run()

        return call

    monkeypatch.setattr(tiles, "kernels", lambda: {"up_expansion": ticking})
    monkeypatch.setattr(tiles.engine, "device_clock", lambda device: lambda: ticks[0])
    found = tiles.tune("up_expansion", cell, device, rounds=3, until=time.monotonic() + 60)
    assert found["config"] == better and found["gain"] == 3.0
    entry = tiles.entry(found, "any", WHERE)
    assert entry["measured"] == WHERE | {"gain": 3.0}
    tables.write(folder, "up_expansion", [entry])
    at = {"M": 5, "r": 3}
    assert tables.first("up_expansion", "any", at, adapter="narrow")["config"] == better
    assert tables.first("up_expansion", "any", {"M": 6, "r": 3}, adapter="narrow") != entry
    assert tables.first("up_expansion", "any", at, adapter="float32") != entry


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rounds", "0"], "must be positive"), ([], "needs a GPU that PyTorch sees")],
)
def test_what_the_command_refuses(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *words]) == 2
    assert message in capsys.readouterr().err


def test_gpu_check_in_its_dry_form(tmp_path):
    """Every stage to its end: what it would run is made, and its results are files."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--dry", "--output", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "gpu-check: all stages done" in done.stdout
    kernels, tuned, bench, model = (
        json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        for name in ("kernels", "tune", "layer", "model")
    )
    tests = {path.name for path in (ROOT / "tests").glob("test_triton*.py")}
    assert {Path(entry["name"]).name for entry in kernels} >= tests
    assert all(entry["code"] == 0 for entry in kernels)
    assert {entry["kernel"] for entry in tuned if entry["part"] == "tiles"} == set(tiles.kernels())
    measured = [entry for entry in tuned if entry["part"] == "implementations"]
    assert all({"aten", *dispatch.TRITON_FORMS} <= set(entry["ratio"]) for entry in measured)
    assert measured
    assert {entry["method"] for entry in bench} == {"lora", "dora", "ssb"}
    for entry in bench:
        beside = "formula" if entry["method"] == "ssb" else "PEFT"
        assert {"frozen", "control", "ours", beside} <= set(entry["contenders"])
        assert {"both", "cold both"} <= set(entry["contenders"]["ours"]["ratio"])
    assert {(entry["method"], entry["checkpointing"]) for entry in model} == {
        (method, kind) for method in ("lora", "dora", "ssb") for kind in ("none", "block")
    }
    for entry in model:
        beside = "formula" if entry["method"] == "ssb" else "PEFT"
        assert {"frozen", "control", "ours", beside} <= set(entry["contenders"])
    again = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--dry", "--output", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0 and "frozen 1.000" not in again.stdout  # nothing was left to do


SHIPPED = sorted(path.stem for path in (ROOT / "decomp_kernels/kernels/configs").glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_entry_can_be_taken_somewhere_and_something_fits_everywhere(name):
    shipped, archs = tables.shipped(name), list(LIMITS)
    for number, entry in enumerate(shipped):
        homes = archs if entry["arch"] == "any" else [entry["arch"]]
        assert any(not tables.hidden(entry, shipped[:number], arch) for arch in homes), entry
        on_a_cpu = entry["arch"] in ("avx2", "avx512", "avx512_bf16")
        assert entry["measured"] is False or on_a_cpu  # of GPUs until somebody has
    huge = dict.fromkeys(("M", "N", "K", "r", "NK", "adapters", "scaled", "dropout"), 10**9)
    for arch in [*archs, "sm_999"]:
        for adapter in ("narrow", "float32"):
            for base in ("narrow", "float32"):
                plain = lambda entry: not entry.get("config", {}).get("DESCRIPTORS")  # noqa: E731
                tables.first(name, arch, huge, able=plain, adapter=adapter, base=base)


def test_an_entry_is_hidden_by_one_that_is_always_taken_before_it():
    entry = {"arch": "any", "when": {"M_max": 16}, "base": "float32", "config": {}}
    for other, expected in (
        ({"arch": "any", "when": {}}, True),
        ({"arch": "sm_80", "when": {"M_max": 16}, "base": "float32"}, True),
        ({"arch": "sm_80", "when": {"M_max": 32}}, True),
        ({"arch": "sm_80", "when": {"M_max": 8}}, False),
        ({"arch": "sm_80", "when": {"r_max": 8}}, False),
        ({"arch": "sm_90", "when": {}}, False),
        ({"arch": "any", "when": {}, "base": "narrow"}, False),
        ({"arch": "any", "when": {}, "adapter": "narrow"}, False),
        ({"arch": "any", "when": {}, "config": {"DESCRIPTORS": True}}, False),
    ):
        assert tables.hidden(entry, [other], "sm_80") == expected, other
