"""The measuring engine: what it says of cases whose answer is known by hand."""

import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decomp_kernels.bench import engine, layer_tables, layers, memory, peers, record
from decomp_kernels.bench.engine import CONTROL, FROZEN, Contender
from decomp_kernels.cli.bench import layer as layer_suite
from decomp_kernels.cli.main import main
from decomp_kernels.methods import methods
from decomp_kernels.ops.decomposed_linear import decomposed_linear

CPU = torch.device("cpu")
M, K, N, R = 32, 48, 64, 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    with pytest.raises(ValueError, match="method must be one of .*lora.*, got 'lorra'"):
        list(layers.rows(["lorra"], [(1, 2, 3)], ["float32"], 4))


def test_gradients_are_dropped_between_steps():
    module = nn.Linear(3, 5)
    contender = engine.layer("a", module, torch.ones(2, 3), torch.ones(2, 5))
    engine.measure([contender], 3, warmup=1)
    assert torch.equal(module.bias.grad, torch.full((5,), 2.0))  # of one step, not of four


# --- memory -----------------------------------------------------------------------------------


def of(function, *, saved_beside=(), x=None):
    """(peak, saved) bytes of forward + backward of a function of x."""
    x = torch.randn(M, K) if x is None else x

    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    with torch.no_grad():
        dy = torch.randn_like(function(x))
    contender = engine.layer("layer", Layer(), x, dy)
    return memory.peak_bytes(contender, CPU), memory.saved_bytes(contender, saved_beside)


def test_a_frozen_linear_saves_nothing_and_allocates_y_and_dx():
    weight = torch.randn(N, K)
    peak, saved = of(lambda x: F.linear(x, weight), saved_beside=[weight])
    assert saved == 0
    assert peak == 4 * (M * N + M * K)


def test_a_trained_linear_saves_x_and_allocates_dw_too():
    linear = nn.Linear(K, N, bias=False)
    contender = engine.layer("linear", linear, torch.randn(M, K), torch.randn(M, N))
    assert memory.saved_bytes(contender, linear.parameters()) == 4 * M * K
    assert memory.peak_bytes(contender, CPU) == 4 * (M * N + M * K + N * K)


def test_a_weight_that_is_not_excluded_counts_once():
    weight = torch.randn(N, K)
    _, saved = of(lambda x: F.linear(F.linear(x, weight), weight.T))
    assert saved == 4 * N * K


def test_relu_saves_its_output():
    assert of(torch.relu) == (4 * 2 * M * K, 4 * M * K)


def test_dropout_saves_its_mask():
    peak, saved = of(lambda x: F.dropout(x, 0.5))
    assert saved >= M * K  # a byte an element, or the scaled mask in x's dtype
    assert peak >= saved + 4 * M * K


def test_a_temporary_is_in_the_peak_and_not_in_what_is_saved():
    def wasteful(x):
        torch.empty(10 * M * K)
        return torch.relu(x)

    assert of(wasteful) == (4 * 10 * M * K, 4 * M * K)


def test_a_sparse_tensor_counts_with_its_indices():
    indices, values = torch.tensor([[0, 2, 5], [1, 0, 7]]), torch.randn(3)
    weight = torch.sparse_coo_tensor(
        indices, values, (N, K), is_coalesced=True, check_invariants=True
    )
    _, saved = of(lambda x: torch.sparse.mm(weight, x.T).T)
    assert saved == 8 * 6 + 4 * 3


def lowrank(dtype=torch.float32):
    down, up = torch.randn(R, K), torch.randn(N, R)
    return {name: t.to(dtype).requires_grad_() for name, t in (("down", down), ("up", up))}


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["p=0", "p=0.5"])
def test_lora_saves_x_and_t_and_nothing_else(dropout):
    weight, terms = torch.randn(N, K), lowrank()
    kept = [weight, *terms.values()]
    _, saved = of(
        lambda x: decomposed_linear(x, weight, **terms, dropout=dropout, seed=torch.tensor(3)),
        saved_beside=kept,
    )
    assert saved == 4 * (M * K + M * R) + (8 if dropout else 0)  # the seed, an int64


def test_float32_adapters_keep_a_float32_t():
    weight, terms = torch.randn(N, K).bfloat16(), lowrank()
    x = torch.randn(M, K).bfloat16()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, **terms), saved_beside=[weight, *terms.values()], x=x
    )
    assert saved == 2 * M * K + 4 * M * R


def test_ia3_saves_z():
    weight, scale = torch.randn(N, K), torch.rand(N).requires_grad_()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, out_scale=scale), saved_beside=[weight, scale]
    )
    assert saved == 4 * M * N


def test_ssl_saves_x():
    weight, scale = torch.randn(N, K), torch.rand(K).requires_grad_()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, in_scale=scale), saved_beside=[weight, scale]
    )
    assert saved == 4 * M * K


# --- the suite --------------------------------------------------------------------------------


def bench(*words):
    return main(["bench", *map(str, words)])


def test_rows_cover_the_registry_and_the_variants():
    made = list(layers.rows(None, [(8, 16, 24)], ["float32", "bfloat16"], 4))
    assert {row.method for row in made} == set(methods())
    labels = {(row.label, row.dtype) for row in made}
    assert len(labels) == len(made)
    assert ("lora, fp32 adapters", "bfloat16") in labels
    assert ("lora, fp32 adapters", "float32") not in labels
    assert ("dora, cached norm", "float32") in labels
    for row in made:
        method = row.make()
        assert getattr(method, "r", 4) in (4, layers.OWN_SIZE.get(row.method, {}).get("r"))


def test_layer_suite_writes_what_the_schema_says(tmp_path, capsys):
    output, image = tmp_path / "out" / "layer.json", tmp_path / "layer.png"
    shape = ("--shape", "8,16,24", "--rank", 4, "--rounds", 2, "--threads", 1)
    assert bench("layer", "--methods", "lora", "ssb", "ia3", *shape, "--dtype", "bfloat16",
                 "--output", output, "--picture", image) == 0  # fmt: skip
    content = json.loads(output.read_text())
    assert set(content) == {
        "format", "suite", "date", "commit", "machine", "versions", "protocol", "rows",
    }  # fmt: skip
    assert content["format"] == record.FORMAT
    assert content["machine"]["threads"] == 1
    assert content["machine"]["cpu"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["protocol"]["rounds"] == 2
    for row in content["rows"]:
        assert row["shape"] == [8, 16, 24]
        for name in (FROZEN, CONTROL, layers.OURS):
            got = row["contenders"][name]
            assert set(got) == {
                "path", "ratio", "ns", "peak_bytes", "saved_bytes", "trainable",
            }  # fmt: skip
            assert set(got["ratio"]) == set(got["ns"]) == set(engine.PHASES)
            assert all(len(samples) == 2 and min(samples) > 0 for samples in got["ns"].values())
        assert row["contenders"][FROZEN]["saved_bytes"] == 0
    by_label = {row["label"]: row["contenders"] for row in content["rows"]}
    assert by_label["lora"]["ours"]["trainable"] == 4 * (16 + 24)
    assert by_label["ssb"]["peer"]["path"] == "authors' formula"
    assert by_label["lora"]["ours"]["saved_bytes"] == 2 * 8 * (16 + 4)
    printed = capsys.readouterr().out
    assert "lora, fp32 adapters, dropout 0.05" in printed
    assert image.read_bytes().startswith(b"\x89PNG")

    assert bench("table", output, output) == 0
    assert "| ssb" in capsys.readouterr().out
    goal = {"label": "lora", "shape": [8, 16, 24], "dtype": "bfloat16",
            "adapter_dtype": "bfloat16", "peft": 1.2}  # fmt: skip
    goals = tmp_path / "goals.json"
    goals.write_text(json.dumps({"goals": [goal | {"goal": 1e6}, goal | {"goal": -1e6},
                                           goal | {"goal": 1.0, "label": "hra?"}]}))  # fmt: skip
    assert bench("table", output, "--goals", goals) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    for line, verdict in zip(lines, ("yes", "no", "not measured"), strict=True):
        assert f"| {verdict} " in line


def test_a_table_goes_between_its_two_lines_of_a_document(tmp_path, capsys):
    output, document = tmp_path / "layer.json", tmp_path / "page.md"
    assert bench("layer", "--methods", "ia3", "--shape", "8,16,24", "--rounds", 1, "--threads", 1,
                 "--dtype", "float32", "--output", output) == 0  # fmt: skip
    document.write_text("before\n<!-- layers -->\nold\n<!-- end of layers -->\nafter\n")
    for _ in range(2):
        assert bench("table", output, "--into", document) == 0
        text = document.read_text()
        assert text.startswith("before\n<!-- layers -->\n\n")
        assert text.endswith("\n\n<!-- end of layers -->\nafter\n")
        assert text.count("| ia3 ") == 1
        assert "old" not in text
    document.write_text("nothing marked")
    assert bench("table", output, "--into", document) == 2
    assert "must have one line <!-- layers -->" in capsys.readouterr().err
    assert document.read_text() == "nothing marked"


def test_peers_compute_something_with_the_same_parameters():
    pytest.importorskip("peft")
    for row in layers.rows([*peers.CONFIGS], [(8, 16, 24)], ["float32"], 4):
        contenders, modules = layers.build(row, seed=0, device=CPU)
        counts = {
            contender.name: sum(p.numel() for p in module.parameters() if p.requires_grad)
            for contender, module in zip(contenders, modules, strict=True)
        }
        assert counts["ours"] == counts["peer"] > 0, row.label


def test_no_trained_tensor_is_at_its_start():
    (row,) = list(layers.rows(["lora"], [(8, 16, 24)], ["float32"], 4))[:1]
    _, modules = layers.build(row, seed=0, device=CPU)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert len(trained) == 4  # ours and PEFT's A and B
    assert all((p != 0).all() for p in trained)


def test_the_repository_s_goals_name_rows_that_exist():
    goals = Path(__file__).parents[1] / "benchmarks" / "goals.json"
    known = {
        layer_tables.key({**vars(row), "label": row.label, "shape": row.shape})
        for row in layers.rows(None, layer_suite.SHAPES, ["float32", "bfloat16"], 16)
    }
    for goal in json.loads(goals.read_text())["goals"]:
        assert layer_tables.key(goal | {"bias": False}) in known, goal


@pytest.mark.parametrize("words", [("--shape", "8,16"), ("--rounds", "0"), ("--dtype", "int8")])
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        bench("layer", *words)
    assert words[1] in capsys.readouterr().err


def test_the_cpu_clock_is_for_one_thread(tmp_path, capsys):
    words = ("layer", "--methods", "ia3", "--shape", "8,16,24", "--rounds", 1, "--clock", "cpu")
    assert bench(*words, "--threads", 2) == 2
    assert "give --threads 1 and --device cpu with it, got --threads 2" in capsys.readouterr().err
    output = tmp_path / "cpu.json"
    assert bench(*words, "--threads", 1, "--output", output) == 0
    assert "CPU time" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) < 60  # one line a row, raw samples included


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", None])
def test_a_file_of_another_kind_is_refused(text, tmp_path, capsys):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    assert bench("table", file) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "must be a results file of format" in message or text is None


def test_an_unknown_method_is_refused(capsys):
    assert bench("layer", "--methods", "lorra") == 2
    assert "method must be one of" in capsys.readouterr().err


def test_several_processes_show_a_range():
    def row(median):
        ratio = {"both": {"median": median, "q1": median - 0.1, "q3": median + 0.1}}
        return {"label": "a", "shape": [1, 2, 3], "dtype": "float32", "adapter_dtype": "float32",
                "bias": False, "contenders": {"ours": {"ratio": ratio}}}  # fmt: skip

    groups = layer_tables.grouped([row(1.1), row(1.3)])
    assert len(groups) == 1
    (group,) = groups.values()
    assert layer_tables.ratio_text(group, "ours") == "1.10-1.30"
    assert layer_tables.quartiles(group, "ours") == pytest.approx((1.0, 1.4))


def test_the_operators_benchmarks_run():
    root = Path(__file__).parents[1]
    words = ["-m", "pytest", "benchmarks", "-q", "--benchmark-disable", "--threads=1"]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
