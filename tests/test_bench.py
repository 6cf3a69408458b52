"""The layer suite: its rows, its contenders and what they took, its file and its tables."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from decomp_kernels import dispatch, native_library
from decomp_kernels.bench import (
    compiled,
    contenders,
    engine,
    layer_tables,
    layers,
    observed,
    peers,
    record,
)
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.cli.bench import layer as layer_suite
from decomp_kernels.cli.main import main
from decomp_kernels.explanation import explain
from decomp_kernels.methods import methods

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    for name in ("lora", "dora"):  # dropout and adapters, each with each
        assert (f"{name}, fp32 adapters, dropout 0.05", "bfloat16") in labels
    for row in made:
        method = row.make()
        assert getattr(method, "r", 4) in (4, layers.OWN_SIZE.get(row.method, {}).get("r"))


def test_each_row_is_there_once_and_misfits_of_the_registry_are_left_out(capsys):
    twice = layers.rows(["ia3", "ia3"], [(8, 4, 6)] * 2, ["float32"] * 2, 4, (False, False))
    assert len(list(twice)) == 1
    every = list(layers.rows(None, [(8, 4, 6)], ["float32", "bfloat16"], 16))
    fitting = layer_suite._fitting(every, named=False)
    left = {row.method for row in every} - {row.method for row in fitting}
    assert {"pissa", "milora"} <= left < set(methods())
    said = capsys.readouterr().err
    assert said.count("left out: pissa on 4 x 6: r must be at most min(") == 1


def test_a_grid_of_dropout_adapters_and_bias():
    """Of methods that have no dropout one row stands for all; float32 is wide on bf16 alone."""
    made = list(
        layers.rows(
            ["lora", "ssb", "dora"], [(8, 16, 24)], ["float32", "bfloat16"], 4, [False, True],
            [0.0, 0.1], ["base", "float32"],
        )
    )  # fmt: skip
    labels = [(row.label, row.dtype) for row in made if not row.bias]
    assert labels == [
        *((name, "float32") for name in ("lora", "lora, dropout 0.1", "ssb", "dora",
                                         "dora, dropout 0.1")),
        *((name, "bfloat16") for name in ("lora", "lora, fp32 adapters", "lora, dropout 0.1",
                                          "lora, fp32 adapters, dropout 0.1", "ssb",
                                          "ssb, fp32 adapters", "dora", "dora, fp32 adapters",
                                          "dora, dropout 0.1", "dora, fp32 adapters, dropout 0.1")),
    ]  # fmt: skip
    biased = [row.label for row in made if row.bias]
    assert len(biased) == len(labels) and all(label.endswith(", bias") for label in biased)
    wide = {row.label: row for row in made}["dora, fp32 adapters, dropout 0.1, bias"]
    assert (wide.adapter_dtype, wide.make().dropout_mode) == ("float32", "peft")
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got 1.5"):
        list(layers.rows(["ssb"], [(8, 16, 24)], ["float32"], 4, dropouts=[1.5]))


def test_layer_suite_writes_what_the_schema_says(tmp_path, capsys):
    pytest.importorskip("peft")
    output, image = tmp_path / "out" / "layer.json", tmp_path / "layer.png"
    shape = ("--shape", "8,16,24", "--rank", 4, "--rounds", 2, "--threads", 1)
    assert bench("layer", "--methods", "lora", "ssb", "ia3", *shape, "--dtype", "bfloat16",
                 "--impls", "aten", "reference", "--output", output,
                 "--picture", image) == 0  # fmt: skip
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
        for name in (FROZEN, CONTROL, contenders.OURS):
            got = row["contenders"][name]
            assert set(got) == {
                "path", "calls", "ratio", "ns", "peak_bytes", "saved_bytes", "trainable",
            }  # fmt: skip
            assert set(got["ratio"]) == set(got["ns"]) == set(engine.PHASES)
            assert all(len(samples) == 2 and min(samples) > 0 for samples in got["ns"].values())
        assert row["contenders"][FROZEN]["saved_bytes"] == 0
        assert row["contenders"]["reference"]["path"] == "reference"
    by_label = {row["label"]: row["contenders"] for row in content["rows"]}
    assert by_label["lora"]["ours"]["trainable"] == 4 * (16 + 24)
    assert by_label["ssb"]["formula"]["path"] == "written out"
    assert by_label["lora"]["ours"]["saved_bytes"] == 2 * 8 * (16 + 4)
    assert by_label["lora"]["PEFT"]["path"] == "peft.tuners.lora, bfloat16 adapters"
    wide = by_label["lora"]["PEFT, float32 adapters"]
    assert wide["path"] == "peft.tuners.lora, float32 adapters"
    assert "PEFT, float32 adapters" not in by_label["lora, fp32 adapters"]  # PEFT itself there
    assert "2 of 2 calls fused" in by_label["lora"]["PEFT, accelerate()"]["path"]
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


def test_resume_keeps_what_is_there_and_measures_the_rest(tmp_path, capsys):
    output = tmp_path / "layer.json"
    words = ("layer", "--shape", "8,16,24", "--rounds", 1, "--threads", 1, "--dtype", "float32",
             "--impls", "auto", "--no-peer", "--resume", "--output", output)  # fmt: skip
    assert bench(*words, "--methods", "ia3") == 0
    (first,) = json.loads(output.read_text())["rows"]
    assert bench(*words, "--methods", "ssl", "ia3") == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows[0] == first  # with its samples: it was not measured again
    assert [row["label"] for row in rows] == ["ia3", "ssl"]
    assert "1/1  ssl" in capsys.readouterr().err.splitlines()[-1]
    assert bench(*words, "--methods", "ssb", "--rank", 8) == 2
    message = capsys.readouterr().err
    assert "same protocol" in message and "has rank 16, asked for is rank 8" in message
    text = output.read_text()
    output.write_text(text.replace(record.machine()["cpu"], "another chip"))
    assert bench(*words, "--methods", "ssb") == 2
    assert "is of another chip, this one is" in capsys.readouterr().err
    older = json.loads(text) | {"versions": {"torch": "1.0"}}
    output.write_text(json.dumps(older))
    assert bench(*words, "--methods", "ssb") == 2
    assert "is of torch 1.0, this one is torch " in capsys.readouterr().err
    assert bench(*words[:-2], "--methods", "ssb") == 2
    assert "--resume needs --output FILE.json" in capsys.readouterr().err


def test_resume_refuses_a_row_that_cannot_be_shown_before_it_measures(tmp_path, capsys):
    output = tmp_path / "layer.json"
    words = ("layer", "--shape", "8,16,24", "--rounds", 1, "--threads", 1, "--dtype", "float32",
             "--impls", "auto", "--no-peer", "--resume", "--output", output)  # fmt: skip
    assert bench(*words, "--methods", "ia3") == 0
    content = json.loads(output.read_text())
    content["rows"][0]["label"] = None
    text = json.dumps(content)
    output.write_text(text)
    capsys.readouterr()
    assert bench(*words, "--methods", "ssl") == 2
    assert "the rows must be those that the suite 'layer' writes" in capsys.readouterr().err
    assert output.read_text() == text


def test_rows_of_another_gpu_are_not_gone_on_with(tmp_path, monkeypatch):
    """Their file would be headed by the GPU of now; rows of the CPU do not care which there is."""
    content = record.document("layer", {"device": "cuda"}, [])
    content["machine"]["gpus"] = ["one GPU"]
    here = record.machine()
    monkeypatch.setattr(record, "machine", lambda: here | {"gpus": ["one GPU"]})
    record.check_same_place(content, tmp_path)
    monkeypatch.setattr(record, "machine", lambda: here | {"gpus": ["another"]})
    with pytest.raises(ValueError, match="is of one GPU, this one is another;"):
        record.check_same_place(content, tmp_path)
    record.check_same_place(content | {"protocol": {"device": "cpu"}}, tmp_path)


def test_peers_compute_something_with_the_same_parameters():
    pytest.importorskip("peft")
    for row in layers.rows([*peers.CONFIGS], [(8, 32, 24)], ["float32"], 4):
        made = layers.build(row, seed=0, device=CPU)
        counts = {
            entry.contender.name: sum(
                p.numel() for p in entry.module.parameters() if p.requires_grad
            )
            for entry in made.entries
        }
        assert counts["ours"] == counts["PEFT"] == counts["PEFT, accelerate()"] > 0, row.label
        assert made.left_out == {"formula": f"no formula is written out for {row.method}"}


def test_no_trained_tensor_is_at_its_start():
    (row,) = list(layers.rows(["lora"], [(8, 16, 24)], ["float32"], 4))[:1]
    made = layers.build(row, seed=0, device=CPU)
    modules = [entry.module for entry in made.entries]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert len(trained) == 6  # A and B of ours, of PEFT's and of PEFT's after accelerate
    assert all((p != 0).all() for p in trained)


@pytest.mark.parametrize("dtype, names", [("float32", None), ("bfloat16", ["lora", "dora"])])
def test_what_ran_is_what_explain_says(dtype, names):
    """Of every method, and the named implementation where one is named."""
    for row in layers.rows(names, [(8, 32, 24)], [dtype], 4):
        made = layers.build(row, seed=0, device=CPU, impls=dispatch.CANDIDATES, others=False)
        paths = {
            entry.contender.name: observed.implementation(entry.path) for entry in made.entries
        }
        assert paths.pop(FROZEN) == paths.pop(CONTROL) == "nn.Linear"
        explained = layers.expected_path(explain(made.ours, 8))
        if getattr(row.make(), "dropout_mode", "") == "peft" and row.make().dropout:
            # Two calls of the operator, with dropout and without; explain decides by the first.
            assert explained in (paths["ours"], *paths["ours"].split(" and ")), row.label
            paths.pop("ours")
        else:
            assert paths.pop("ours") == explained, row.label
        assert all(path == name for name, path in paths.items()), row.label
        lacking = set(dispatch.CANDIDATES) - set(row.make().impls)
        assert all(made.left_out[impl].endswith("has no such form") for impl in lacking)


def test_an_observed_step_says_what_it_called(monkeypatch):
    """The variable that names an implementation changes what ours takes, and it shows."""
    (row,) = list(layers.rows(["dora"], [(8, 32, 24)], ["float32"], 4))[:1]
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    made = layers.build(row, seed=0, device=CPU, impls=["aten"])
    entries = {entry.contender.name: entry for entry in made.entries}
    assert entries["ours"].path == "reference"
    assert entries["PEFT, accelerate()"].path == "2 of 2 calls fused, reference"
    way = "aten" + observed.ONE_CALL * bool(native_library.autograd_node())
    assert list(entries["aten"].calls) == [
        f"decomposed_linear backward: {way}, 1", f"decomposed_linear forward: {way}, 1",
        "row_norm forward: aten, 1",
    ]  # fmt: skip
    assert entries["PEFT"].path == "peft.tuners.lora, float32 adapters"
    before = vars(sys.modules["decomp_kernels.kernels.aten.decomposed_linear"])["forward"]
    with observed.Observed():
        assert vars(sys.modules[before.__module__])["forward"] is not before
    assert vars(sys.modules[before.__module__])["forward"] is before


def test_compiled_contenders_are_compiled_once(monkeypatch):
    """Preparing one must not make the other one's compiled code be forgotten."""
    pytest.importorskip("peft")
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)
    (row,) = list(layers.rows(["lora"], [(8, 16, 24)], ["float32"], 4))[:1]
    found = layers.run(row, rounds=1, warmup=1, seed=0, device=CPU, compile_too=True)
    paths = {name: entry["path"] for name, entry in found["contenders"].items()}
    assert paths[contenders.PEFT_COMPILED] == "inductor: 1 graph, 0 breaks"
    assert paths[contenders.OURS_COMPILED] == "inductor: 1 graph, 0 breaks, aten"


def test_what_peft_refuses_is_left_out_with_its_reason():
    pytest.importorskip("peft")
    row = layers.Row("sparse", (), (8, 16, 24), "float32", "float32")  # by density: not PEFT's
    made = layers.build(row, seed=0, device=CPU)
    assert made.left_out["PEFT"].startswith("PEFT refuses it: ")
    assert {entry.contender.name for entry in made.entries} == {FROZEN, CONTROL, "ours"}


def test_work_and_share_of_the_roof_by_hand():
    """LoRA: 2 M N K a product, and 2 M r (N + K) for each of the branch's passes."""
    (row,) = list(layers.rows(["lora"], [(8, 32, 24)], ["float32"], 4))[:1]
    found = layers.run(row, rounds=3, warmup=0, seed=0, device=CPU, others=False)
    M, K, N, r = 8, 32, 24, 4
    gemm, branch = 2 * M * N * K, 2 * M * r * (N + K)
    work = found["work"]
    assert work["frozen"]["flops"] == {"forward": gemm, "backward": gemm, "both": 2 * gemm}
    assert work["ours"]["flops"] == {
        "forward": gemm + branch, "backward": gemm + 2 * branch, "both": 2 * gemm + 3 * branch,
    }  # fmt: skip
    assert work["frozen"]["bytes"]["forward"] == 4 * (M * K + N * K + M * N)
    ratio = found["contenders"]["ours"]["ratio"]["forward"]["median"]
    share = found["roof"]["share"]["forward"]["median"]
    assert share == pytest.approx((gemm + branch) / gemm / ratio)
    assert found["expected_path"] == observed.implementation(found["contenders"]["ours"]["path"])


class Broken(nn.Module):
    """A layer that a compiler has to break in two."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = self.linear(x)
        torch._dynamo.graph_break()
        return y * y.detach().mean()


class Uncompiled(Broken):
    """One that a compiler may not look into: it runs as it is."""

    @torch.compiler.disable
    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("module, path", [
    (nn.Sequential(nn.Linear(6, 6)), "inductor: 1 graph, 0 breaks"),
    (Broken(), "inductor: 2 graphs, 1 break"),
    (Uncompiled(), "not compiled: inductor was given no graph"),
])  # fmt: skip
def test_what_the_compiler_made_is_counted(module, path, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)
    run = compiled.Compiled(module)
    contender = engine.layer("a", run, torch.ones(4, 6), torch.ones(4, 6))
    run.prepare(lambda: engine.step(contender))
    assert run.path() == path
    if run.graphs:
        run(torch.ones(5, 6, requires_grad=True))  # another shape
        assert "compiled later" in run.path()


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


@pytest.mark.parametrize("damage, message", [
    ({"rows": None}, "its rows are missing or of another kind"),
    ({"rows": [1]}, "its rows are missing or of another kind"),
    ({"rows": [{"commit": [1]}]}, "its rows are missing or of another kind"),
    ({"rows": [{}]},
     "the rows must be those that the suite 'layer' writes, got KeyError: 'shape'"),
    ({"protocol": None, "machine": 1}, "its machine and protocol are missing or of another kind"),
    ({"suite": "scale"}, "must be a results file of bench layer, got one of 'scale'"),
])  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(damage, message, tmp_path, capsys):
    file = tmp_path / "layer.json"
    text = json.dumps(record.document("layer", {}, []) | damage)
    file.write_text(text)
    for words in (("table", file), ("layer", "--methods", "ia3", "--resume", "--output", file)):
        assert bench(*words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert file.read_text() == text


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"goals": [{}]}'])
def test_goals_of_another_kind_are_refused(text, tmp_path, capsys):
    results, goals = tmp_path / "layer.json", tmp_path / "goals.json"
    record.write(results, record.document("layer", {"rounds": 1}, []))
    goals.write_text(text)
    assert bench("table", results, "--goals", goals) == 2
    assert f'{goals} must be a JSON object of "goals"' in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (("--methods", "lorra"), "method must be one of"),
    (("--dropout", "1.5"), "dropout must be at least 0 and below 1, got 1.5"),
    (("--impls", "atten"), "--impls must be all, auto or names of reference, aten"),
    (("--impls", "auto", "aten"), "got auto aten"),
    (("--impls", "native:fused"), "--impls native:fused cannot run here: "),
    (("--methods", "pissa", "--shape", "8,4,16"), "pissa on 4 x 16: r must be at most min("),
    (("--methods", "lora", "--dtype", "float32", "--adapter-dtype", "float32"), "got none"),
    (("--methods", "lora", "--shape", "8,9000000,9000000"), "got some that need at least"),
    (("--threads", 100_000), "--threads must be at most the "),
    (("--device", "meta"), "--device meta needs a device that PyTorch sees"),
    (("--seed", 2**70), "--seed must be a number of at most 64 bits"),
])  # fmt: skip
def test_bad_options_are_refused_before_any_work(words, message, capsys):
    assert bench("layer", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["layer", "model", "scale", "quality"])
def test_a_picture_without_matplotlib_is_refused_before_any_work(
    suite, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(suite, "--picture", tmp_path / "a.png") == 2
    assert "this needs the package 'matplotlib'" in capsys.readouterr().err


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
