"""The measuring engine: what it says of cases whose answer is known by hand."""

import json
from pathlib import Path

import pytest
import torch

from decomp_kernels.bench import engine, layer_tables, layers, peers, record
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.cli.bench import layer as layer_suite
from decomp_kernels.cli.main import main
from decomp_kernels.methods import methods

CPU = torch.device("cpu")
M, K, N, R = 32, 48, 64, 4


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
