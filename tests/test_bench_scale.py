"""The scale suite: fits whose answer is known, planted times, bytes that are exact, processes."""

import json
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from decomp_kernels.bench import engine, growth, ranks, record, scale_tables
from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT
from decomp_kernels.bench.engine import CONTROL, FROZEN, Contender
from decomp_kernels.bench.exponents import fit
from decomp_kernels.bench.growth import Point
from decomp_kernels.bench.observed import implementation
from decomp_kernels.cli.main import main

CPU = torch.device("cpu")
SHAPE, RANK = (16, 24, 32), 4  # M, K, N
POINT = Point("lora", "M", 16, SHAPE, RANK, 1, 1, "float32")


def bench(*words):
    return main(["bench", "scale", *map(str, words)])


def measured(point, **options):
    settings = {"rounds": 2, "warmup": 1, "seed": 0, "device": CPU, "peer": False}
    return growth.run(point, **settings | options)


# --- the fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 1.5, 3.0])
def test_a_power_law_is_found_exactly(exponent):
    sizes = [3, 8, 20, 77, 400]
    found = fit(sizes, [7.0 * size**exponent for size in sizes])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert found.factor == pytest.approx(7.0)
    assert found.at(50) == pytest.approx(7.0 * 50**exponent)
    assert found.sizes == 5


def test_the_standard_error_is_that_of_least_squares():
    sizes, values = [1, 2, 4, 8, 16, 32], [1.0, 2.3, 3.6, 9.1, 15.0, 35.0]
    found = fit(sizes, values)
    line, covariance = numpy.polyfit(numpy.log(sizes), numpy.log(values), 1, cov=True)
    assert found.exponent == pytest.approx(line[0])
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert found.error > 0.01


def test_what_cannot_be_fitted():
    assert math.isnan(fit([1, 2], [1.0, 4.0]).error)
    assert fit([1, 2], [1.0, 4.0]).exponent == pytest.approx(2.0)
    assert fit([5], [1.0]) is None
    assert fit([5, 5], [1.0, 2.0]) is None
    with pytest.raises(ValueError, match="must be above 0, got 0.0 at size 2"):
        fit([1, 2], [1.0, 0.0])


# --- planted times ----------------------------------------------------------------------------


def planted(size, ours, frozen, control):
    """A row whose contenders take so many ns a step; control: a list, one a round."""
    now, slower = [0], iter(control)

    def contender(name, ns):
        def forward():
            now[0] += ns()

        return Contender(name, forward, lambda _: None, lambda: None)

    contenders = [
        contender(FROZEN, lambda: frozen),
        contender(CONTROL, lambda: next(slower)),
        contender(OURS, lambda: ours),
    ]
    samples = engine.measure(contenders, len(control), warmup=0, clock=lambda: now[0])
    measures = {
        name: {
            "path": "planted", "ns": samples.ns[name], "peak_bytes": 8 * size, "saved_bytes": 0,
            "ratio": {"both": samples.ratio(name)._asdict()},
        }
        for name in samples.ns
    }  # fmt: skip
    work = {name: {"flops": size, "bytes": size} for name in (FROZEN, OURS)}
    return {
        "axis": "M", "method": "lora", "dtype": "float32", "size": size, "shape": [size, 8, 8],
        "r": 4, "layers": 1, "ranks": 1, "work": work, "contenders": measures,
    }  # fmt: skip


def test_a_planted_law_shows_in_the_step_and_in_what_is_added():
    rows = []
    for size in (16, 64, 256, 1024):
        frozen = 1000 * size
        rows.append(planted(size, frozen + 500 * round(size**1.5), frozen, [frozen] * 5))
    (group,) = scale_tables.series(rows)
    assert scale_tables.exponent(group, scale_tables.time_of(FROZEN)) == "1.00 ± 0.00"
    assert scale_tables.exponent(group, scale_tables.added_time(OURS)) == "1.50 ± 0.00"


def test_an_addition_below_the_noise_is_left_out_and_said():
    def row(size, added):
        frozen = 100_000
        return planted(size, frozen + added, frozen, [frozen - 900, frozen + 900, frozen + 100])

    (group,) = scale_tables.series([row(size, 200 * size) for size in (64, 4, 2, 16)])
    assert [entry["size"] for entry in group] == [2, 4, 16, 64]
    added = scale_tables.added_time(OURS)
    assert [added(entry) for entry in group] == [None, None, 3200, 12800]
    assert scale_tables.exponent(group, added) == "1.00 (2 of 4 sizes)"
    assert scale_tables.exponent(group[:2], added) == "noise"


class Ticks:
    """A clock that goes on by one tick at each reading."""

    def __init__(self, tick):
        self.now, self.tick = 0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_an_injected_clock_s_law_comes_out_of_the_suite():
    rows = []
    for M in (4, 16, 64):
        point = replace(POINT, size=M, shape=(M, 24, 32))
        rows.append(measured(point, clock=Ticks(round(10 * M**1.5))))
    (group,) = scale_tables.series(rows)
    for name in (FROZEN, OURS):
        found, left_out = scale_tables.fitted(group, scale_tables.time_of(name), name)
        assert found.exponent == pytest.approx(1.5, abs=1e-12)
        assert left_out == 0
    assert scale_tables.exponent(group, scale_tables.added_time(OURS)) == "noise"


# --- what is measured -------------------------------------------------------------------------


def grown(method, axis, sizes, shape=SHAPE, layers=1):
    made = growth.points([method], [axis], {axis: sizes}, shape=shape, r=RANK, layers=layers,
                         dtype="float32")  # fmt: skip
    (group,) = scale_tables.series([measured(point, clock=Ticks(1)) for point in made])
    return group


@pytest.mark.parametrize(
    ("method", "axis"),
    [(method, axis) for method in ("lora", "dora", "ssb") for axis in ("M", "N", "K", "layers")]
    + [("lora", "r"), ("dora", "r")],
)
def test_bytes_saved_are_the_law_s(method, axis):
    for row in grown(method, axis, [8, 16] if axis != "layers" else [1, 3]):
        M, K, N = row["shape"]
        law = 4 * row["layers"] * scale_tables.SAVED[method](M, K, N, row["r"])
        small = 0 if method != "dora" else 4 * row["layers"] * (3 * N)  # norms and scales
        found = row["contenders"][OURS]["saved_bytes"]
        assert law <= found <= law + small
        assert row["contenders"][FROZEN]["saved_bytes"] == 0


def test_exponents_of_memory_are_exact():
    tokens = grown("lora", "M", [8, 32, 128])
    saved = scale_tables.held(OURS, "saved_bytes")
    assert scale_tables.exponent(tokens, saved) == "1.00 ± 0.00"
    frozen = scale_tables.held(FROZEN, "peak_bytes")
    assert scale_tables.exponent(tokens, frozen) == "1.00 ± 0.00"
    layers = grown("lora", "layers", [1, 2, 5])
    assert scale_tables.exponent(layers, saved) == "1.00 ± 0.00"


def test_what_lora_adds_to_the_peak_does_not_grow_with_the_weight():
    added = []
    for width in (64, 256):
        (row,) = grown("lora", "M", [32], shape=(32, width, width))
        added.append(scale_tables.held(OURS, "peak_bytes", FROZEN)(row))
    assert added[1] < 5 * added[0]  # N K is 16 times as much, N + K 4 times


def test_the_path_is_what_ran(monkeypatch):
    monkeypatch.setenv("DECOMP_KERNELS_IMPL", "aten")
    stack = replace(POINT, layers=3, shape=(16, 24, 24))
    assert implementation(measured(stack)["contenders"][OURS]["path"]) == "aten x 3"
    monkeypatch.setenv("DECOMP_KERNELS_IMPL", "reference")
    found = measured(POINT)["contenders"]
    assert found[OURS]["path"] == "reference x 1"


def test_peft_is_there_with_the_same_parameters():
    pytest.importorskip("peft")
    found = measured(replace(POINT, layers=2, shape=(16, 24, 24)), peer=True)["contenders"]
    assert set(found) == {FROZEN, CONTROL, OURS, PEFT}
    assert found[OURS]["trainable"] == found[PEFT]["trainable"] == 2 * RANK * 48
    assert set(found[OURS]["ratio"]) == set(found[OURS]["ns"]) == set(engine.PHASES)


def test_the_formula_is_there_where_peft_has_no_such_method():
    found = measured(replace(POINT, method="ssb"), peer=True)["contenders"]
    assert set(found) == {FROZEN, CONTROL, OURS, FORMULA}
    assert found[OURS]["trainable"] == found[FORMULA]["trainable"] == 24 + 32
    assert found[FORMULA]["path"] == "written out"


def test_no_trained_tensor_is_at_its_start():
    stacks, x, dy = growth.build(replace(POINT, layers=2, shape=(16, 24, 24)), seed=0, device=CPU)
    trained = [p for stack in stacks for p in stack.module.parameters() if p.requires_grad]
    assert len(trained) >= 4
    assert all((p != 0).all() for p in trained)
    assert (x != 0).all() and (dy != 0).all()


def test_one_size_grows_and_the_others_stay():
    made = list(growth.points(["lora", "ssb"], growth.AXES, growth.QUICK_SIZES, shape=SHAPE,
                              r=RANK, layers=2, dtype="float32"))  # fmt: skip
    for point in made:
        growth.check(point)
        M, K, N = point.shape
        changed = {"M": M, "K": K, "N": N, "r": point.r, "layers": point.layers}
        usual = {"M": 16, "K": 24, "N": 32, "r": RANK, "layers": 1}
        if point.axis in ("layers", "ranks"):
            usual |= {"N": 24, "layers": 2 if point.axis == "ranks" else 1}
        changed["ranks"], usual["ranks"] = point.ranks, 1
        assert changed == usual | {point.axis: point.size}
    assert {point.method for point in made if point.axis == "r"} == {"lora"}
    assert {point.axis for point in made} == set(growth.AXES)


# --- processes --------------------------------------------------------------------------------


def leftovers():
    return set(Path(tempfile.gettempdir()).glob("decomp_kernels-ranks-*"))


def test_ranks_reduce_the_adapter_s_gradients_and_nothing_else(monkeypatch):
    monkeypatch.setenv("DECOMP_KERNELS_IMPL", "aten")
    there = leftovers()
    point = replace(POINT, axis="ranks", size=2, ranks=2, layers=2, shape=(16, 24, 24))
    (row,) = ranks.run([point], rounds=2, warmup=1, seed=0, threads=1, device=CPU, peer=False)
    found = row["contenders"]
    assert set(found) == {FROZEN, CONTROL, OURS, ranks.ALONE}
    trainable = 2 * RANK * 48
    assert found[OURS]["trainable"] == trainable
    assert found[OURS]["reduced_bytes"] == 4 * trainable
    assert implementation(found[OURS]["path"]) == "aten x 2; DDP, buckets: 1"
    assert found[ranks.ALONE]["reduced_bytes"] == found[FROZEN]["reduced_bytes"] == 0
    for contender in found.values():
        by_rank = contender["ns_by_rank"]
        assert len(by_rank) == len(contender["cpu_ns"]) == 2
        assert all(len(times) == 2 and min(times) > 0 for times in (*by_rank, *contender["cpu_ns"]))
        assert contender["ns"]["both"] == [max(pair) for pair in zip(*by_rank)]
        both = contender["ns"]["both"]
        frozen = found[FROZEN]["ns"]["both"]
        median = sum(a / b for a, b in zip(both, frozen)) / 2  # of two
        assert contender["ratio"]["both"]["median"] == pytest.approx(median)
    assert row["threads"] == 1
    assert leftovers() == there


def failing(rank, world, folder, timeout, text):
    if rank == 1:
        raise ValueError(text)
    Path(text).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_failing_rank_ends_the_others(tmp_path):
    there, pid = leftovers(), tmp_path / "pid"
    with pytest.raises(ranks.RanksFailed, match=r"rank 1 of 2: Traceback(?s:.*)ValueError") as said:
        ranks.apart(failing, 2, (str(pid),), timeout=120)
    assert "rank 0" not in str(said.value)
    if pid.exists():  # it may have been killed before
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    assert leftovers() == there


def test_ranks_that_do_not_end_are_killed():
    there = leftovers()
    with pytest.raises(ranks.RanksFailed, match="1 of 1 processes had not ended after 0.2 s"):
        ranks.apart(failing, 1, ("",), timeout=0.2)
    assert leftovers() == there


def test_the_table_says_where_ranks_share_cores():
    rows = []
    for world, ms in ((1, 10), (4, 40)):
        row = planted(world, ms * 10**6, 10**6, [10**6] * 3)
        for contender in row["contenders"].values():
            contender |= {"cpu_ns": [[9 * 10**6]] * world, "reduced_bytes": 2048}
        row["contenders"][ranks.ALONE] = row["contenders"][OURS]
        row |= {"axis": "ranks", "ranks": world, "cores": 2, "threads": 1}
        rows.append(row | {"ideal": max(1.0, world / 2)})
    table = scale_tables.tables({"rows": rows})[-1]
    assert table.title == "Data parallel ranks"
    assert "This machine has 2 cores, fewer than" in table.words
    one, four = (dict(zip(table.header, line)) for line in table.lines)
    assert (one["efficiency"], one["of the cores"]) == ("100%", "100%")
    assert (four["efficiency"], four["of the cores"]) == ("25%", "50%")
    assert four["CPU ms a rank"] == "9.00"
    assert four["KiB reduced a step ours/theirs"] == "2.0/-"
    few = scale_tables.tables({"rows": rows[:1]})[-1]
    assert "fewer" not in few.words


# --- the command ------------------------------------------------------------------------------


def test_the_command_writes_a_file_from_which_its_tables_come(tmp_path, capsys):
    output, image = tmp_path / "out" / "scale.json", tmp_path / "scale.png"
    assert bench("--axes", "M", "r", "--methods", "lora", "ssb", "--shape", "8,16,24", "--rank", 2,
                 "--sizes", "M=32,8,16", "--sizes", "r=1,2,4", "--rounds", 2, "--threads", 1,
                 "--no-peer", "--output", output, "--picture", image) == 0  # fmt: skip
    content = json.loads(output.read_text())
    assert content["suite"] == "scale"
    assert [row["label"] for row in content["rows"]] == [
        "lora, M = 8", "ssb, M = 8", "lora, M = 16", "ssb, M = 16", "lora, M = 32", "ssb, M = 32",
        "lora, r = 1", "lora, r = 2", "lora, r = 4",
    ]  # fmt: skip
    said = capsys.readouterr()
    assert len([line for line in said.err.splitlines() if line.partition("/")[0].isdigit()]) == 9
    tables = scale_tables.tables(content)
    assert len(tables) == 3
    assert all(table.markdown() in said.out for table in tables)
    by_series = {tuple(line[:2]): dict(zip(tables[1].header, line)) for line in tables[1].lines}
    assert by_series["M", "ssb"]["saved ours"] == "1.00 ± 0.00"
    assert by_series["M", "ssb"]["saved, by law"] == "1.00"
    assert 0 < float(by_series["r", "lora"]["saved ours"].split()[0]) < 0.2
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "lorra"), "method must be one of"),
        (("--axes", "r", "--methods", "ssb"), "the axis r is for methods with a rank, got ssb"),
        (
            ("--axes", "r", "--methods", "pissa", "--shape", "8,16,16", "--sizes", "r=4,64"),
            "pissa, r = 64: r must be at most min(out_features, in_features) = 16",
        ),
        (("--axes", "ranks", "--sizes", "ranks=1,100000"), "ranks are processes: there must be"),
        (("--axes", "layers", "--sizes", "layers=10000000"), "got some that need at least"),
        (("--device", "foo"), "--device foo needs a device that PyTorch sees"),
        (("--device", "cuda:77"), "--device cuda:77 needs a device that PyTorch sees"),
        (("--clock", "cpu", "--threads", 2), "give --threads 1 and --device cpu with it"),
    ],
)
def test_bad_input_is_refused_before_any_work(words, message, capsys, monkeypatch):
    monkeypatch.setattr(growth, "run", lambda *_, **__: pytest.fail("it measured"))
    assert bench(*words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ranks.RanksFailed("rank 1 of 2: gone")

    monkeypatch.setattr(ranks, "run", fail)
    output = tmp_path / "scale.json"
    words = ("--axes", "M", "ranks", "--methods", "ssb", "--shape", "8,16,24", "--sizes", "M=8",
             "--rounds", 1, "--no-peer", "--output", output)  # fmt: skip
    assert bench(*words) == 1
    assert "rank 1 of 2: gone" in capsys.readouterr().err
    (row,) = json.loads(output.read_text())["rows"]
    assert row["label"] == "ssb, M = 8"
    assert bench(*words[:1], "M", *words[3:], "--sizes", "M=8,16", "--resume") == 0
    first, second = json.loads(output.read_text())["rows"]
    assert first == row and second["label"] == "ssb, M = 16"
    assert bench(*words, "--resume", "--seed", 3) == 2
    assert "has seed 0, asked for is seed 3" in capsys.readouterr().err


def test_another_suites_file_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "run", lambda *_, **__: pytest.fail("it measured"))
    words = ("--axes", "M", "--methods", "ssb", "--shape", "8,16,24", "--sizes", "M=8")
    output = tmp_path / "layer.json"
    for text in (json.dumps(record.document("layer", {}, [])), "notes"):
        output.write_text(text)
        assert bench(*words, "--output", output) == 2
        assert "--output is there already, and" in capsys.readouterr().err
        assert output.read_text() == text
    assert bench(*words, "--output", tmp_path / "a", "--picture", tmp_path / "a") == 2
    assert "--output and --picture must be two files" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["M", "M=", "M=1,x", "M=0", "W=1,2", "M=1,-2"])
def test_wrong_sizes_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        bench("--sizes", text)
    assert f"got {text!r}" in capsys.readouterr().err
