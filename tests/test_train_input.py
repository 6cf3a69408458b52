"""What the training command refuses, in one clear line with exit code 2; and what it reads."""

import json
import sys

import pytest
import torch

from decomp_kernels.cli import data_docstrings, datasets, options
from decomp_kernels.cli.data_files import read_rows
from decomp_kernels.cli.errors import BadInput, need
from decomp_kernels.cli.main import main
from decomp_kernels.cli.tasks import Scores, gain_interval

PAIR = '{"query": "a b", "document": "c"}\n'


def refused(arguments, capsys) -> str:
    """The one line on stderr, of a command that must fail with 2 and print nothing else."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's own, which has its usage above the line
        code = stopped.code
        lines = capsys.readouterr().err.strip().splitlines()[-1:]
    else:
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert captured.out == ""
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


# Options: (arguments, what is said).
BAD_OPTIONS = {
    "unknown method": (["--method", "lorra"], "unknown method 'lorra'; the methods are adalora"),
    "unknown option": (["--method", "lora", "-O", "rank=3"], "LoRA has no option 'rank'"),
    "wrong rank": (["--method", "lora", "-O", "r=0"], "r must be at least 1, got 0"),
    "wrong type": (["--method", "lora", "-O", "r=two"], "must be int, got 'two'"),
    "option of no method": (["-O", "r=3"], "must come after the --method"),
    "option without value": (["--method", "lora", "-O", "r"], "must be KEY=VALUE"),
    "empty method": (["--method", ","], "must name a method"),
    "rate is text": (["--lr", "fast"], "--lr must be a number, got 'fast'"),
    "rate is negative": (["--lr", "-1"], "--lr must be greater than 0"),
    "rate of a method": (["--method", "lora", "--lr", "0"], "--lr must be greater than 0"),
    "rate is nan": (["--lr", "nan"], "--lr must be greater than 0"),
    "steps": (["--steps", "0"], "--steps must be greater than 0, got 0"),
    "both": (["--steps", "3", "--epochs", "1"], "--steps or --epochs, not both"),
    "dtype": (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
    "task": (["--task", "sort"], "--task must be one of auto, retrieval, language"),
    "pooling": (["--pooling", "max"], "--pooling must be one of mean, cls"),
    "constraint": (["--mpc", "n"], "--mpc must be one of o, d"),
    "rounds": (["--rounds", "-1"], "--rounds must not be negative"),
    "resume or not": (["--resume", "--overwrite"], "--resume or --overwrite, not both"),
    "model without data": (["--model", "somewhere"], "--model needs --data"),
    "unknown flag": (["--speed", "3"], "unrecognized arguments: --speed"),
    "no configuration": (["--config", "/nowhere/c.yaml"], "cannot read /nowhere/c.yaml"),
    "no model": (["--model", "./nowhere", "--data", "d.jsonl"], "found no folder ./nowhere"),
    "device": (["--device", "tpu9"], "--device tpu9 cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_are_refused(case, capsys, tmp_path):
    arguments, said = BAD_OPTIONS[case]
    assert said in refused(["train", "--output", tmp_path / "run", *arguments], capsys)
    assert not (tmp_path / "run").exists()


# Files of rows: (name, content, task, what is said).
BAD_FILES = {
    "not JSON": ("d.jsonl", PAIR + "{nope\n", "retrieval", "line 2: not valid JSON"),
    "no object": ("d.jsonl", PAIR + "[1]\n", "retrieval", "line 2: must be a JSON object, got [1]"),
    "deep": ("d.jsonl", "[" * 100_000, "retrieval", "line 1: not valid JSON"),
    "column": ("d.jsonl", '{"query": "a"}', "retrieval", "needs the columns 'query' and"),
    "column later": ("d.jsonl", PAIR + '\n{"query": "a"}', "retrieval", "line 3: the column"),
    "number": ("d.jsonl", '{"query": "a", "document": 3}', "retrieval", "must be text, got 3"),
    "blank": ("d.jsonl", '{"query": " ", "document": "c"}', "retrieval", "'query' is empty"),
    "nothing": ("d.jsonl", "\n\n", "retrieval", "holds no rows"),
    "header alone": ("d.csv", "query,document\n", "retrieval", "holds no rows"),
    "CSV column": ("d.csv", "query,answer\na,b\n", "retrieval", "line 2: retrieval data needs"),
    "CSV short": ("d.csv", "query,document\na\n", "retrieval", "line 2: fewer fields"),
    "CSV long": ("d.csv", "query,document\na,b,c\n", "retrieval", "line 2: more fields"),
    "CSV quote": ("d.csv", 'query,document\n"a,b\n', "retrieval", "line 2: unexpected end"),
    "encoding": ("d.jsonl", b'{"query": "\xff"}', "retrieval", "must be UTF-8"),
    "language": ("d.jsonl", PAIR, "language", "'text' or 'prompt' and 'completion', got"),
    "ending": ("d.txt", PAIR, "retrieval", "must be a .jsonl or .csv file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_are_refused(case, tmp_path):
    name, content, task, said = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as refusal:
        read_rows(path, task)
    assert said in str(refusal.value)
    assert name in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"cannot read .*d\.csv: No such file"):
        read_rows(tmp_path / "d.csv", "retrieval")


def test_both_formats_give_the_same_rows(tmp_path):
    rows = [("a, b", "one\nline"), ('say "c"', "é")]
    lines = [json.dumps({"document": d, "query": q, "n": 1}) for q, d in rows]
    (tmp_path / "d.jsonl").write_text("﻿" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "d.csv").write_text(
        'n,document,query\n1,"one\nline","a, b"\n2,é,"say ""c"""\n', encoding="utf-8"
    )
    assert read_rows(tmp_path / "d.jsonl", "retrieval") == rows
    assert read_rows(tmp_path / "d.csv", "retrieval") == rows


def test_rows_are_held_out_once_and_the_same_for_every_seed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)))
    data = datasets.gather(str(path), None, None, "language")
    assert len(data.held_out) == 5
    assert sorted(data.train + data.held_out) == sorted((f"row {i}",) for i in range(50))
    assert data == datasets.gather(str(path), None, None, "language")
    assert datasets.gather(str(path), str(path), None, "language").held_out == [
        (f"row {i}",) for i in range(50)
    ]
    for eval_data, held_out, said in (
        (None, 50, "50 rows are to be held out, but the data has 50"),
        (str(path), 3, "--eval-data or --held-out"),
    ):
        with pytest.raises(BadInput, match=said):
            datasets.gather(str(path), eval_data, held_out, "language")
    with pytest.raises(BadInput, match="built-in data is for retrieval"):
        datasets.gather(None, None, None, "language")


def test_an_unwritable_output_is_refused(tmp_path, monkeypatch):
    from decomp_kernels.cli import folder

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "mkdir", forbidden)
    with pytest.raises(BadInput, match="cannot write to --output .*Permission denied"):
        folder.open_job(tmp_path / "run", options.TrainOptions(), "0")


def test_an_output_that_is_a_file_is_refused(tmp_path):
    from decomp_kernels.cli import folder

    (tmp_path / "run").write_text("")
    with pytest.raises(BadInput, match="cannot write to --output"):
        folder.open_job(tmp_path / "run", options.TrainOptions(), "0")


# Configuration files


def config(path, content):
    path.write_text(content)
    return options.gather({"config": str(path)})


def test_a_configuration_file_has_the_same_options(tmp_path):
    text = """
        method: [ssb, {name: lora, r: 16, alpha: 32, lr: 1e-3}]
        batch-size: 4
        target_modules: [query, value]
        lr: 2e-2
        resume: true
    """
    found = config(tmp_path / "c.yaml", text)
    assert [choice.name for choice in found.method] == ["ssb", "lora"]
    assert found.method[1].options == {"r": 16, "alpha": 32}
    assert [found.learning_rate(choice) for choice in found.method] == [2e-2, 1e-3]
    assert found.batch_size == 4
    assert found.target_modules == ["query", "value"]
    assert found.resume
    as_json = {"method": "ssb,dora", "steps": 7}
    (tmp_path / "c.json").write_text(json.dumps(as_json))
    given = {"config": str(tmp_path / "c.json"), "steps": 9}
    found = options.gather(given)
    assert [choice.name for choice in found.method] == ["ssb", "dora"]
    assert found.steps == 9, "the command line wins"


BAD_CONFIGS = {
    "unknown key": ("c.yaml", "stepps: 3", "unknown key 'stepps'; the keys are"),
    "config in config": ("c.yaml", "config: d.yaml", "unknown key 'config'"),
    "wrong type": ("c.yaml", "steps: many", "--steps must be an integer, got 'many'"),
    "bool for int": ("c.yaml", "steps: true", "--steps must be an integer, got True"),
    "text for bool": ("c.yaml", "resume: maybe", "--resume must be true or false, got 'maybe'"),
    "names": ("c.yaml", "target-modules: [1]", "--target-modules must be text or a list"),
    "rate": ("c.yaml", "lr: fast", "--lr must be a number, got 'fast'"),
    "method": ("c.yaml", "method: [3]", "method must be names or mappings"),
    "method option": ("c.yaml", "method: [{name: lora, rank: 3}]", "LoRA has no option 'rank'"),
    "a list": ("c.yaml", "[1, 2]", "must hold a mapping of options, got list"),
    "empty": ("c.yaml", "", "must hold a mapping of options"),
    "not YAML": ("c.yaml", "a: [", "is not valid YAML"),
    "code": ("c.yaml", "steps: !!python/object/apply:os.getpid []", "is not valid YAML"),
    "not JSON": ("c.json", '{"steps": 3', "line 1: not valid JSON"),
    "ending": ("c.toml", "steps = 3", "must be a .yaml, .yml or .json file"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_are_refused(case, tmp_path):
    name, content, said = BAD_CONFIGS[case]
    with pytest.raises(BadInput) as refusal:
        config(tmp_path / name, content)
    assert said in str(refusal.value)


def test_options_belong_to_the_method_before_them():
    from decomp_kernels.cli.main import _parser

    line = (
        "train --lr 0.5 --method ssb --method lora,dora -O r=4 -O lora_alpha=1e1 --lr 0.1 "
        "--method lora --option use_rslora=true"
    )
    arguments = line.split()
    args = vars(_parser(arguments).parse_args(arguments))
    given = {name: args[name] for name in ("lr", "method")}
    found = options.gather(given)
    assert [choice.label for choice in found.method] == ["ssb", "lora", "dora", "lora-2"]
    assert [found.learning_rate(choice) for choice in found.method] == [0.5, 0.1, 0.1, 0.5]
    made = [choice.make() for choice in found.method]
    assert (made[1].r, made[1].alpha) == (4, 10.0)
    assert (made[2].r, made[2].alpha) == (4, 10.0)
    assert made[3].use_rslora


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("None", None), ("relu", "relu"), ("[1]", [1])],
)
def test_values_of_method_options(text, value):
    assert options.parse_value(text) == value
    assert type(options.parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all-linear", "all-linear"),
        ("query,value", ["query", "value"]),
        ("query", ["query"]),
        (r".*\.(query|value)", r".*\.(query|value)"),
    ],
)
def test_names_of_modules(text, value):
    assert options.parse_names(text) == value


# The built-in data


@pytest.fixture(scope="module")
def built_in():
    before = set(sys.modules)
    found = data_docstrings.pairs()
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not {"antigravity", "turtle", "this"} & loaded, "sources are parsed, never imported"
    return found


def test_the_built_in_data_are_there(built_in):
    assert len(built_in) > 2_000
    names = [name for _, name in built_in]
    assert "textwrap.dedent" in names
    assert len(set(names)) == len(names)
    assert len({query for query, _ in built_in}) == len(built_in)


def test_no_query_holds_a_word_of_its_name(built_in):
    for query, name in built_in:
        words = {word.lower() for part in name.split(".") for word in part.split("_") if word}
        assert not words & set(query.lower().replace("_", " ").split()), (name, query)


def test_the_words_of_a_name_are_taken_out():
    text = "Return DictReader's rows.\n\n  A dict reader (csv) reads a row_reader; readers stay."
    found = data_docstrings.without_name(text, "csv.DictReader.fieldnames")
    assert found == "Return 's rows. A () reads a row_; readers stay."


def test_a_machine_without_sources_is_told(tmp_path):
    with pytest.raises(BadInput, match="give --data"):
        data_docstrings.pairs(tmp_path)


# Statistics, and packages that are not there


def test_the_interval_is_that_of_the_normal_law_for_many_rows():
    torch.manual_seed(1)
    rows, ones = 4000, torch.ones(4000, dtype=torch.float64)
    before = Scores(torch.zeros(rows, dtype=torch.float64), ones)
    change = torch.randn(rows, dtype=torch.float64) + 0.2
    gain, low, high = gain_interval(before, Scores(change, ones), True, seed=0)
    assert gain == pytest.approx(change.mean().item())
    half = 1.96 * change.std().item() / rows**0.5
    assert low == pytest.approx(gain - half, rel=0.05)
    assert high == pytest.approx(gain + half, rel=0.05)
    lost, low_lost, high_lost = gain_interval(before, Scores(change, ones), False, seed=0)
    assert (lost, low_lost, high_lost) == pytest.approx((-gain, -high, -low), rel=0.05)


def test_rows_have_their_weights():
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    before = Scores(torch.tensor([2.0, 6.0], dtype=torch.float64), weights)
    after = Scores(torch.tensor([2.0, 3.0], dtype=torch.float64), weights)
    gain, low, high = gain_interval(before, after, False, seed=0)
    assert before.metric == 2.0
    assert gain == 0.75
    assert (low, high) == (0.0, 1.0)


def test_a_package_that_is_not_there_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BadInput, match=r'pip install "decomp_kernels\[train\]"'):
        need("transformers", "train")


def test_an_import_that_breaks_inside_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_package_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        need("half_there", "train")
