"""The measuring engine: what it says of cases whose answer is known, by hand or by arithmetic."""

import os
import stat
import time
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import nn

from decomp_kernels.bench import conditions, engine, layer_tables, machine, record
from decomp_kernels.bench.engine import CONTROL, FROZEN, Contender
from decomp_kernels.bench.graphs import WARM_UP
from decomp_kernels.cli.main import main

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Watch:
    """A clock that moves when a contender says so."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def contender(self, name, forward, backward, log=None):
        def step(ns):
            self.now += ns
            if log is not None:
                log.append(name)

        return Contender(name, lambda: step(forward), lambda _: step(backward), lambda: None)


def test_a_planted_ten_percent_shows_exactly():
    watch = Watch()
    contenders = [
        watch.contender(FROZEN, 300, 700),
        watch.contender(CONTROL, 300, 700),
        watch.contender("slow", 300, 800),
    ]
    samples = engine.measure(contenders, 7, clock=watch)
    assert samples.ratio("slow") == (1.1, 1.1, 1.1)
    assert samples.ratio("slow", "forward") == (1.0, 1.0, 1.0)
    assert samples.ratio("slow", "backward") == (800 / 700,) * 3
    assert samples.ratio(CONTROL) == (1.0, 1.0, 1.0)
    assert samples.time("slow") == (1100, 1100, 1100)


def test_a_machine_that_slows_down_does_not_move_a_ratio():
    watch = Watch()
    steps = count()

    def drifting(name, ns):
        def step():
            watch.now += ns * (1 + next(steps) // 2)  # one pace for the two steps of a round

        return Contender(name, step, lambda _: None, lambda: None)

    contenders = [drifting(FROZEN, 1000), drifting("slow", 1100)]
    samples = engine.measure(contenders, 9, warmup=0, clock=watch)
    assert samples.ns[FROZEN]["both"] == [1000 * pace for pace in range(1, 10)]
    assert samples.ratio("slow") == (1.1, 1.1, 1.1)


def test_every_contender_runs_once_a_round_in_changing_order():
    watch, log = Watch(), []
    contenders = [watch.contender(name, 1, 0, log) for name in (FROZEN, CONTROL, "a", "b")]
    engine.measure(contenders, 12, warmup=0, clock=watch)
    steps = log[::2]  # forward and backward each write one line
    orders = [tuple(steps[i : i + 4]) for i in range(0, len(steps), 4)]
    assert len(orders) == 12
    assert all(len(set(order)) == 4 for order in orders)
    assert len(set(orders)) > 4


def test_without_split_the_clock_is_not_read_in_the_middle():
    watch = Watch()
    samples = engine.measure([watch.contender(FROZEN, 2, 3)], 2, clock=watch, split=False)
    assert samples.ns == {FROZEN: {"both": [5, 5]}}


def test_quartiles():
    assert engine.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert engine.spread([2.0]) == (2.0, 2.0, 2.0)


def test_says_what_is_wrong():
    contender = Watch().contender("a", 1, 1)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        engine.measure([contender], 0)
    with pytest.raises(ValueError, match=r"different names, got \['a', 'a'\]"):
        engine.measure([contender, contender], 1)


def test_gradients_are_dropped_between_steps():
    module = nn.Linear(3, 5)
    contender = engine.layer("a", module, torch.ones(2, 3), torch.ones(2, 5))
    engine.measure([contender], 3, warmup=1)
    assert torch.equal(module.bias.grad, torch.full((5,), 2.0))  # of one step, not of four


# --- real kernels -----------------------------------------------------------------------------

SIZE, ROWS, ROUNDS, TRIES = 512, 320, 121, 6


def slowing():
    """The CPU time of this thread on a machine that slows down to a third within a second."""
    start = time.thread_time_ns()

    def clock():
        passed = time.thread_time_ns() - start
        return passed + passed * passed // 10**9

    return clock


@pytest.mark.parametrize("clock", [lambda: time.thread_time_ns, slowing], ids=["steady", "slowing"])
def test_ten_percent_more_rows_show_as_five_to_fifteen(clock):
    """A measurement whose control is off by 3 % is none, and is taken again."""
    linear = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)

    def of(name, rows):
        return engine.layer(name, linear, torch.randn(rows, SIZE), torch.randn(rows, SIZE))

    contenders = [of(FROZEN, ROWS), of(CONTROL, ROWS), of("more rows", ROWS + ROWS // 10)]
    for seed in range(TRIES):
        samples = engine.measure(contenders, ROUNDS, clock=clock(), seed=seed, split=False)
        control, more = samples.ratio(CONTROL).median, samples.ratio("more rows").median
        print(f"control {control:.3f}, 10 % more rows {more:.3f}")
        if abs(control - 1.0) < 0.03:
            break
    assert abs(control - 1.0) < 0.03, f"no valid measurement in {TRIES}"
    assert 1.05 < more < 1.15


# --- caches and graphs, on a device that is played ----------------------------------------------


class PlayedCuda:
    """As much of torch.cuda as recording needs: a graph replays in a tenth of the eager time."""

    def __init__(self, watch, refuses=()):
        self.watch, self.refuses, self.log, self.stream_now = watch, refuses, [], "home"

    def current_stream(self):
        return self._stream(self.stream_now)

    def Stream(self):
        return self._stream("aside")

    def _stream(self, name):
        class Stream:
            def wait_stream(_, other):
                self.log.append(f"{name} waits")

            def __str__(_):
                return name

        return Stream()

    def set_stream(self, stream):
        self.stream_now = str(stream)

    @contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, str(stream)
        yield
        self.stream_now = before

    def CUDAGraph(self):
        class Graph:
            ns = 0

            def replay(graph):
                self.log.append("replay")
                self.watch.now += graph.ns // 10

        return Graph()

    @contextmanager
    def graph(self, graph):
        self.stream_now = "recording"
        start = self.watch.now
        yield  # one that raises leaves this stream current, as PyTorch's does
        self.stream_now = "home"
        graph.ns, self.watch.now = self.watch.now - start, start


def played(frozen_ns, refuses=(), **options):
    """(samples, why not replayed, log) of FROZEN and "other", which takes twice as long."""
    watch, log = Watch(), []
    cuda = PlayedCuda(watch)

    def contender(name, ns):
        def forward():
            if name in refuses and cuda.stream_now == "recording":
                raise RuntimeError("waits for the device")
            log.append(f"{name} on {cuda.stream_now}")
            watch.now += ns

        return Contender(name, forward, lambda _: None, lambda: None)

    def flush():
        log.append("flush")
        watch.now += 10**9

    samples, failed = conditions.measure(
        [contender(FROZEN, frozen_ns), contender("other", 2 * frozen_ns)], 4,
        warmup=0, clock=watch, flush=flush, cuda=cuda, **options,
    )  # fmt: skip
    assert cuda.stream_now == "home"
    return samples, failed, log


EAGER = {f"{cold}{phase}" for cold in ("", "cold ") for phase in engine.PHASES}
REPLAYED = {"replay both", "cold replay both"}


def test_a_short_step_is_timed_eager_and_replayed_warm_and_cold():
    samples, failed, _ = played(50_000, device=GPU)
    assert not failed
    assert set(samples.ns[FROZEN]) == set(samples.ns["other"]) == EAGER | REPLAYED
    assert samples.ns["other"]["both"] == samples.ns["other"]["cold both"] == [100_000] * 4
    assert samples.ns["other"]["replay both"] == samples.ns["other"]["cold replay both"]
    assert samples.ns["other"]["replay both"] == [10_000] * 4
    assert samples.ratio("other", "cold replay both") == (2.0, 2.0, 2.0)


def test_a_long_step_is_not_replayed():
    samples, failed, _ = played(10 * conditions.SHORT_NS, device=GPU)
    assert not failed
    assert set(samples.ns[FROZEN]) == set(samples.ns["other"]) == EAGER


def test_a_step_that_is_long_for_the_host_alone_is_replayed():
    samples, _, _ = played(2 * conditions.SHORT_NS, device=GPU)
    assert set(samples.ns[FROZEN]) == EAGER | REPLAYED


def test_what_cannot_be_recorded_says_why_and_the_others_stay():
    samples, failed, _ = played(50_000, refuses=["other"], device=GPU)
    assert failed == {"other": "RuntimeError: waits for the device"}
    assert set(samples.ns[FROZEN]) == EAGER | REPLAYED
    assert set(samples.ns["other"]) == EAGER
    samples, failed, _ = played(50_000, refuses=[FROZEN], device=GPU)
    assert failed == {FROZEN: "RuntimeError: waits for the device"}
    assert set(samples.ns["other"]) == EAGER


def test_warm_is_after_the_contender_s_own_step_and_cold_after_a_flush():
    _, _, log = played(10 * conditions.SHORT_NS, device=GPU)
    warm, rest = log[:16], log[16:]  # 4 rounds of 2 contenders, each step after its own
    assert warm[::2] == warm[1::2]
    assert set(warm) == {f"{FROZEN} on home", "other on home"}
    cold = rest[:16]
    assert cold[::2] == ["flush"] * 8
    assert set(cold[1::2]) == set(warm)
    warm_up, recorded = rest[16 : 16 + WARM_UP], rest[16 + WARM_UP :]
    assert warm_up == [f"{FROZEN} on aside"] * WARM_UP
    assert recorded == [f"{FROZEN} on recording"]  # the rest are replays


def test_a_cpu_is_timed_as_it_comes_and_cold_where_asked():
    samples, _, log = played(50_000, device=CPU)
    assert set(samples.ns[FROZEN]) == set(engine.PHASES)
    assert len(log) == 8
    samples, _, log = played(50_000, device=CPU, cold=True)
    assert set(samples.ns[FROZEN]) == EAGER
    assert log.count("flush") == 8


def test_a_cpu_s_flush_writes_four_times_its_last_cache(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "1024K", "2M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert conditions.last_level_cache(tmp_path) == 2 * 2**20
    assert conditions.last_level_cache(tmp_path / "none") == conditions.CPU_LAST_LEVEL
    written = []
    monkeypatch.setattr(conditions, "last_level_cache", lambda: 2**20)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, **k: written.append(ones(*a, **k)) or written[0])
    flush = conditions.flusher(CPU)
    flush()
    assert written[0].nbytes == 4 * 2**20
    assert (written[0] == 2).all()


def test_a_device_is_waited_for_after_the_round_and_not_between_its_steps(monkeypatch):
    log, now = [], count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e3  # milliseconds of a device whose events are 1 us apart

    class Module:
        pass

    Module.Event = Event
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    nothing = Contender("a", lambda: None, lambda _: None, lambda: None)
    other = Contender("b", lambda: None, lambda _: None, lambda: None)
    clock = engine.device_clock(GPU)
    samples = engine.measure([nothing, other], 2, warmup=0, clock=clock)
    assert samples.ns["a"] == {"forward": [1000] * 2, "backward": [1000] * 2, "both": [2000] * 2}
    assert log[:6] == ["record"] * 6
    assert log[6:12] == ["wait"] * 6


# --- the machine ------------------------------------------------------------------------------


def test_a_machine_has_what_every_system_tells():
    found = machine.machine()
    assert {"cpu", "cores", "threads", "instruction_set", "system", "gpus"} <= set(found)
    assert found["threads"] == torch.get_num_threads()
    assert record.versions()["torch"] == torch.__version__
    if os.path.exists("/proc/cpuinfo"):
        assert 0 < found["physical_cores"] <= found["cores"]
        assert found["memory_gib"] > 0
        assert found["load_at_start"] >= 0


def test_clocks_and_cores_are_read_from_the_system_s_files(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "CPUFREQ", tmp_path)
    assert machine.physical_cores() is machine.cpu_mhz() is None
    assert "governor" not in machine.machine()
    core = "model name\t: Made Up\ncpu MHz\t\t: {}\nphysical id\t: 0\ncore id\t\t: {}\n\n"
    text = "".join(core.format(mhz, i // 2) for i, mhz in enumerate((900.4, 3100.6, 1000, 1000)))
    (tmp_path / "cpuinfo").write_text(text)
    assert machine.cpu_model() == "Made Up"
    assert machine.physical_cores() == 2
    assert machine.cpu_mhz() == [900, 3101]
    (tmp_path / "cpuinfo").write_text("Processor: of another kind\n")
    for name, khz in (("cpu0", 800_000), ("cpu1", 2_400_000)):
        (tmp_path / name / "cpufreq").mkdir(parents=True)
        (tmp_path / name / "cpufreq" / "scaling_cur_freq").write_text(f"{khz}\n")
    (tmp_path / "cpu0" / "cpufreq" / "scaling_governor").write_text("powersave\n")
    assert machine.cpu_mhz() == [800, 2400]
    assert machine.machine()["governor"] == "powersave"


@pytest.mark.skipif(os.name == "nt", reason="the tool is played by a shell script")
def test_gpu_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_state() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = "--query-gpu='
        'name,clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version" ] || exit 1\n'
        '[ "$2" = "--format=csv,noheader,nounits" ] || exit 1\n'
        'echo "NVIDIA H200, 1980, 3201, 1980, 700.00, 580.65"\n'
        'echo "NVIDIA T4, 585, 5001, 1590, [N/A], 580.65"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    first, second = machine.gpu_state()
    assert first == {
        "name": "NVIDIA H200", "sm_mhz": 1980.0, "memory_mhz": 3201.0, "max_sm_mhz": 1980.0,
        "power_limit_w": 700.0, "driver": "580.65",
    }  # fmt: skip
    assert second["power_limit_w"] == "[N/A]"
    tool.write_text("#!/bin/sh\nexit 9\n")  # installed, and no driver
    assert machine.gpu_state() is None


# --- what the layer suite makes of it ------------------------------------------------------------


def test_cold_times_are_a_table_and_replays_one_of_those_that_have_them(tmp_path, capsys):
    output = tmp_path / "layer.json"
    words = "bench layer --methods lora --shape 8,16,24 --rank 2 --dtype float32 --rounds 1 --cold"
    assert main([*words.split(), "--threads", "1", "--output", str(output)]) == 0
    assert "**Layers: time, cold both.**" in capsys.readouterr().out
    content = record.read(output)
    row = content["rows"][0]
    assert content["protocol"]["cold"]
    assert set(row["contenders"]["ours"]["ratio"]) == EAGER
    for name in (FROZEN, CONTROL, "ours"):  # as a GPU's row is: PEFT could not be recorded
        entry = row["contenders"][name]
        entry["ratio"]["replay both"] = {"median": 1.25, "q1": 1.25, "q3": 1.25}
        entry["ns"]["replay both"] = [20_000]
    found = {table.title: table for table in layer_tables.tables(content)}
    assert set(found) >= {f"Layers: time, {of}" for of in ("both", "cold both", "replay both")}
    replayed = found["Layers: time, replay both"]
    assert len(replayed.lines) == 1  # the variant with dropout has none
    assert "1.25" in replayed.lines[0]
    assert "PEFT" not in replayed.header
    assert "0.02" in replayed.lines[0]  # milliseconds of the frozen one
