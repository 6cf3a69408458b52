"""The report page, the tables of each suite, and what the documents show of results files."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import generate_tables
from decomp_kernels.bench import (
    decoder,
    gains,
    gains_picture,
    growth,
    layer_tables,
    layers,
    model_tables,
    page,
    ranks,
    rerun,
    scale_tables,
    suites,
)
from decomp_kernels.bench.tables import headline
from decomp_kernels.cli.main import main

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/cpu"


def content(suite="layer", rows=(), **more):
    return {
        "format": "decomp_kernels.bench/1", "suite": suite, "date": "2026-01-02T03:04:05+00:00",
        "commit": "c0ffee", "versions": {"torch": "2.99", "peft": "0.99"},
        "machine": {"cpu": "A <CPU>", "cores": 2, "threads": 1, "gpus": []},
        "protocol": {"rounds": 3, "threads": 1, "clock": "cpu", "device": "cpu", "rank": 4},
        "rows": list(rows),
    } | more  # fmt: skip


def contender(ns, frozen, peak, path="a path"):
    ratios = sorted(a / b for a, b in zip(ns, frozen, strict=True))
    spread = {"median": ratios[1], "q1": ratios[0], "q3": ratios[2]}
    phases = ("forward", "backward", "both")
    return {
        "path": path, "calls": [],
        "ratio": dict.fromkeys(phases, spread), "ns": dict.fromkeys(phases, ns),
        "peak_bytes": peak * 2**20, "saved_bytes": 1024, "trainable": 1,
    }  # fmt: skip


def row(method="lora", ours=(110, 111, 112), peer=(120, 121, 122), dtype="bfloat16", **more):
    frozen = [100, 100, 100]
    contenders = {
        "frozen": contender(frozen, frozen, 4),
        "control": contender([100, 101, 99], frozen, 4),
        "ours": contender(list(ours), frozen, 5),
    }
    if peer is not None:
        contenders["PEFT"] = contender(list(peer), frozen, 6, "peft.tuners.lora")
    return {
        "method": method, "label": method, "options": {"r": 4}, "shape": [8, 16, 32],
        "dtype": dtype, "adapter_dtype": dtype, "variant": "", "bias": False, "seconds": 0.1,
        "left_out": {}, "contenders": contenders,
        "work": {name: {"flops": {"both": 1e9}, "bytes": {"both": 1e9}} for name in contenders},
        "roof": {"what": "a roof", "share": {"both": {"median": 0.5, "q1": 0.4, "q3": 0.6}}},
    } | more  # fmt: skip


def saved(folder, name, made):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
    return path


class Outline(HTMLParser):
    """Tags that are open, and everything that a browser would ask the network for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.ids, self.links, self.words = [], [], set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "rect", "path", "link"):
            self.open.append(tag)
        self.asked += [attrs[a] for a in ("src", "srcset", "data", "action") if a in attrs]
        self.asked += [attrs["href"]] if tag == "link" else []
        self.links |= {attrs["href"]} if tag == "a" else set()
        self.ids |= {attrs["id"]} if "id" in attrs else set()

    def handle_endtag(self, tag):
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of every committed results file."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["bench", "report", str(RESULTS), "--output", str(output)]) == 0
    return output.read_text("utf-8")


def test_the_page_of_the_committed_results_is_whole_and_asks_for_nothing(whole):
    outline = Outline(whole)
    assert outline.open == []
    assert all(source.startswith("data:image/png;base64,") for source in outline.asked)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", whole)
    files = sorted(RESULTS.glob("*.json"))
    assert outline.links == {f"#file-{number}" for number in range(len(files))}
    assert {link[1:] for link in outline.links} <= outline.ids
    words = " ".join(outline.words)
    for path in files:
        made = json.loads(path.read_text())
        assert path.name in words
        assert made["commit"][:12] in words
        assert made["date"][:10] in words
        for table in suites.tables(made):
            assert table.title in words
            for line in table.lines:
                assert all(cell.strip("*` ") in words for cell in line)
        assert rerun.command(made) in words


def test_everything_of_a_file_is_escaped(tmp_path):
    planted = "</style><script>alert(1)</script><b a='x' b=\"y\">&"
    rows = [{"a": planted, planted: 1, "b": {"deep": planted}}]
    made = content(planted, rows, commit=planted, versions={planted: planted, "torch": planted})
    layers = content(rows=[row(label=planted, method=planted)], commit=planted)
    layers["rows"].append(
        row("lora", label=f"2 {planted}")
    )  # in the headline table and picture too
    for one in (made, layers):
        one["machine"]["cpu"] = planted
    output = tmp_path / "r.html"
    path = saved(tmp_path, "<i>.json", made)
    other = saved(tmp_path, "<u>.json", layers)
    assert main(["bench", "report", str(path), str(other), "--output", str(output)]) == 0
    text = output.read_text()
    assert text.count("<script") == 1
    assert "<b a" not in text
    assert "<i>" not in text
    assert "<u>" not in text
    assert "alert(1)" in "".join(Outline(text).words)


def test_an_unknown_suite_is_shown_row_by_row():
    made = content("of the future", [{"a": 1, "b": [2, 3]}, {"b": "x", "c": {"d": None}}])
    (table,) = suites.tables(made)
    assert tuple(table.header) == ("a", "b", "c")
    assert [list(line) for line in table.lines] == [["1", "[2, 3]", ""], ["", "x", '{"d": null}']]
    text = page.page([page.Shown("f.json", made)])
    assert "<td>{&quot;d&quot;: null}</td>" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "must be a results file in JSON"),
        ("[]", "must be a results file with a format decomp_kernels."),
        ('{"format": "other/1"}', "got 'other/1'"),
        ('{"format": "decomp_kernels.bench/1", "suite": "layer"}', "must have suite, date"),
        (json.dumps(content(suite=["layer"])), "must have suite, date"),
        (json.dumps(content(protocol=[1])), "must have suite, date"),
        ("[" * 100_000, "must be a results file in JSON"),
        (json.dumps(content(rows=[{"method": "lora"}])), "the rows must be those that the suite"),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_is_written(text, words, tmp_path, capsys):
    path, output = tmp_path / "bad.json", tmp_path / "new" / "r.html"
    path.write_text(text)
    saved(tmp_path, "good.json", content(rows=[row()]))
    assert main(["bench", "report", str(tmp_path), "--output", str(output)]) == 2
    said = capsys.readouterr()
    assert "bad.json" in said.err
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not output.exists()


def test_a_page_is_not_written_over_its_own_results(tmp_path, capsys):
    file = saved(tmp_path, "layer.json", content(rows=[row()]))
    before = file.read_text()
    assert main(["bench", "report", str(tmp_path), "--output", str(file)]) == 2
    assert "--output must not be one of the results files" in capsys.readouterr().err
    assert file.read_text() == before


def test_times_that_do_not_pair_are_refused(tmp_path, capsys):
    made = content(rows=[row()])
    made["rows"][0]["contenders"]["PEFT"]["ns"] = {"both": [1]}
    file = saved(tmp_path, "layer.json", made)
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "page.html")]) == 2
    message = capsys.readouterr().err
    assert f"{file}: the rows must have positive times of each contender" in message
    assert message.count("\n") == 1


def test_places_that_hold_nothing_are_named(tmp_path, capsys):
    assert main(["bench", "report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 2
    assert "must have results files (*.json) in it" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "no.json")]) == 2
    assert "got nothing there" in capsys.readouterr().err


def test_a_command_of_a_row_is_accepted_by_the_command_line(monkeypatch):
    """Every command that the page shows of decomp-kernels: its options are there."""

    from decomp_kernels.cli import main as program

    for path in RESULTS.glob("*.json"):
        made = json.loads(path.read_text())
        commands = {rerun.command(made)} | {rerun.of_row(made, one) for one in made.get("rows", [])}
        for command in commands - {None}:
            words = shlex.split(command)
            if words[0] == "decomp-kernels":
                program._parser(words[1:]).parse_args(words[1:])
            else:
                assert words[0] == "python"
                assert (ROOT / words[1]).exists()


@pytest.mark.parametrize(
    "asked",
    [
        (
            "layer --methods lora dora --shape 8,16,24 --dropout 0.25 --adapter-dtype base float32 "
            "--bias no yes --impls auto --no-peer --rank 3 --dtype bfloat16"
        ),
        (
            "scale --methods ssb lora --axes M ranks --sizes M=4,8 --sizes ranks=1,2 "
            "--shape 8,24,16 --rank 3 --layers 5 --no-peer"
        ),
        (
            "model --methods lora --hidden 32 --layers 1 --heads 4 --kv-heads 2 --intermediate 48 "
            "--vocab 64 --batch 2 --sequence 8 --targets q_proj up_proj --dropout 0.25 --rank 3 "
            "--dtype float32 --checkpointing block"
        ),
    ],
)
def test_a_command_asks_for_the_rows_that_the_file_has(asked, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(layers, "run", lambda given, **_: measured.append(given) or plain(given))
    monkeypatch.setattr(growth, "run", lambda given, **_: measured.append(given) or plain(given))
    monkeypatch.setattr(
        ranks, "run", lambda given, **_: measured.extend(given) or [plain(one) for one in given]
    )
    monkeypatch.setattr(decoder, "run", lambda given, **_: measured.append(given) or plain(given))
    for shown in (layer_tables, scale_tables, model_tables):
        monkeypatch.setattr(shown, "tables", lambda _: [])
        monkeypatch.setattr(shown, "progress", lambda _: "", raising=False)
    monkeypatch.setattr("decomp_kernels.cli.bench.scale._progress", lambda *_: None)
    file = tmp_path / "made.json"
    assert main(["bench", *asked.split(), "--output", str(file)]) == 0
    first, made = list(measured), json.loads(file.read_text())
    measured.clear()
    words = shlex.split(rerun.command(made))
    assert main(words[1:]) == 0
    assert measured == first
    if words[2] != "model":  # whose rows are not asked for one by one
        for one, given in zip(made["rows"], first, strict=True):
            measured.clear()
            assert main(shlex.split(rerun.of_row(made, one))[1:]) == 0
            assert given in measured


def plain(given):
    """What a row of any suite says of what it is."""
    words = vars(given) | {"label": given.label, "seconds": 0.0, "contenders": {}}
    words |= {"size": vars(given.size)} if given.__class__.__module__.endswith("decoder") else {}
    return words | ({"options": dict(given.options)} if "options" in words else {})


def test_a_line_names_its_own_command():
    made = content(rows=[row("lora"), row("dora"), row("lora", dtype="float32")])
    table = suites.tables(made)[0]
    found = [rerun.of_line(made, table.header, line) for line in table.lines]
    assert len(set(found)) == 3
    assert [re.search(r"--methods (\w+) .*--dtype (\w+)", one).groups() for one in found] == [
        ("lora", "bfloat16"), ("dora", "bfloat16"), ("lora", "float32"),
    ]  # fmt: skip


def test_files_stand_by_suite_and_the_whole_one_before_others():
    names = ["b/layer-others.json", "b/layer.json", "a.json"]
    shown = [page.Shown(name, content(rows=[row()])) for name in names[:2]]
    shown.append(page.Shown(names[2], content("of the future")))
    text = page.page(shown)
    assert re.findall(r"<small>(\S+?\.json)</small></li>", text) == [names[1], names[0], names[2]]


# --- what a user gains ------------------------------------------------------------------------


def test_sides_are_by_quartiles_within_rounds():
    rows = [
        row("lora", ours=(100, 110, 120), peer=(101, 112, 123)),  # 1.01 to 1.025: surely faster
        row("dora", ours=(110, 110, 110), peer=(100, 100, 100)),
        row("ia3", ours=(100, 110, 120), peer=(97, 112, 125)),  # 0.99 to 1.03: its median is no win
        row("bitfit", peer=None),
    ]
    found = gains.gains([content(rows=rows)])
    assert [[gain.label for gain in side] for side in gains.sides(found)] == [
        ["lora"], ["dora"], ["ia3"],
    ]  # fmt: skip
    words = gains.said(found)
    assert "faster in 1 of 3 measured rows and slower in 1; in 1 the quartiles span 1" in words
    assert "dora 16 x 32 bf16 1.10 (1.00)" in words
    assert "More peak memory" not in words


def test_the_headline_has_the_ratios_of_the_file():
    rows = [row("lora"), row("dora", ours=(130, 130, 130), peer=(260, 260, 260))]
    found = gains.shown(gains.gains([content(rows=rows)]))
    table = gains.table(found)
    cells = [dict(zip(table.header, line, strict=True)) for line in table.lines]
    assert [one["method"] for one in cells] == ["lora", "dora"]
    assert cells[1] == {
        "method": "dora", "ours": "1.30", "PEFT": "2.60", "PEFT / ours": "**2.00** [2.00, 2.00]",
        "peak MiB: ours": "5.0", "peak MiB: PEFT": "6.0", "peak MiB: frozen": "4.0",
    }  # fmt: skip


def test_the_headline_names_every_commit_whose_rows_are_there():
    rows = [row() | {"commit": "a" * 40}, row() | {"commit": "b" * 40}]
    assert f"commit {'a' * 12}, {'b' * 12}, 2026" in headline(content(rows=rows))
    assert "commit c0ffee, 2026" in headline(content(rows=[row()]))


def test_files_measured_otherwise_do_not_mix():
    one, two = content(rows=[row()] * 2), content(rows=[row()])
    two["protocol"]["threads"] = 2
    assert gains.alike([two, one]) == [one]
    assert gains.alike([two, one, content("model")]) == [one]
    later, other = content(rows=[row()]), content(rows=[row()])
    later["machine"] |= {"cpu_mhz": [2000, 2100], "load_at_start": 3.5}  # the same machine
    other["machine"] |= {"cpu": "another"}
    assert gains.alike([one, later, other]) == [one, later]


def test_the_headline_says_what_ran_and_misses_say_how_many_tokens():
    native = row("dora", ours=(130, 131, 132))
    native["contenders"]["ours"]["path"] = "native:passes"
    found = gains.gains([content(rows=[row(), native])])
    assert "Implementation of ours: a path in 1 row, native:passes in 1 row." in (
        gains.table(found).words
    )
    assert "Implementation of ours: a path." in gains.table(found[:1]).words
    assert "dora 16 x 32 bf16 1.31 (1.21)" in gains.said(found)
    few = gains.gains([content(rows=[row(shape=[4, 16, 32]), native])])
    assert "dora 8 x 16 x 32 bf16 1.31 (1.21)" in gains.said(few)


def test_the_picture_is_the_same_twice_and_shows_each_row():
    found = gains.shown(gains.gains([content(rows=[row("lora"), row("dora")])]))
    drawn = gains_picture.picture(found, "title & more", "machine")
    assert drawn == gains_picture.picture(found, "title & more", "machine")
    assert drawn.count('<rect class="c0"') == drawn.count('<rect class="c1"') == 2 * 2 + 1
    assert "title &amp; more" in drawn
    assert ">dora</text>" in drawn


# --- documents --------------------------------------------------------------------------------


def test_the_documents_show_what_the_results_hold():
    """Its message says what is stale; `make docs` writes them anew."""
    generate_tables.main(["--check"])


def test_the_readme_opens_with_what_a_user_gains():
    text = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[0] == "What you gain"
    opening = text.partition("\n## ")[2].partition("\n## ")[0]
    assert "(docs/gains.svg)" in opening
    assert "(benchmarks/results/cpu/layer.json)" in opening
    assert "decomp-kernels bench layer --methods" in opening
    lines = [line for line in opening.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 10
    for words in ("AMD EPYC", "**Slower**", "**More peak memory**"):
        assert words in opening
    assert re.search(r"\d{4}-\d\d-\d\d", opening)


@pytest.fixture
def tree(tmp_path):
    """A source tree of one document and one results file."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/goals.json", tmp_path / "benchmarks")
    saved(tmp_path / "benchmarks/results/cpu", "layer.json", content(rows=[row(), row("dora")]))
    (tmp_path / "README.md").write_text("# Head\n")
    return tmp_path


def block(spec):
    return f"<!-- results: {spec} -->\n<!-- end of results -->\n"


def test_blocks_and_figures_are_filled_and_then_current(tree):
    figure = "<!-- figure: cpu/layer.json; dora; bf16; ours -->0<!-- end -->"
    fence = f"```text\n{block('cpu/none.json; what')}```\n"
    document = tree / "docs" / "a.md"
    document.write_text(f"{block('cpu/layer.json; gains')}\nIt is {figure} now.\n\n{fence}")
    with pytest.raises(SystemExit, match=r"stale: docs/a.md, docs/gains.svg; run `make docs`"):
        generate_tables.main(["--check"], tree)
    assert "1.11" not in document.read_text()
    generate_tables.main([], tree)
    text = document.read_text()
    assert "It is <!-- figure: cpu/layer.json; dora; bf16; ours -->1.11<!-- end --> now." in text
    assert "([layer.json](../benchmarks/results/cpu/layer.json))" in text
    assert "| dora | 1.11 | 1.21 |" in text
    assert fence in text
    generate_tables.main(["--check"], tree)
    document.write_text(text.replace("| dora | 1.11 |", "| dora | 1.01 |"))
    with pytest.raises(SystemExit, match="stale: docs/a.md"):
        generate_tables.main(["--check"], tree)


@pytest.mark.parametrize("what", ["", "; misses", "; goals", "; Layers: time, both"])
def test_every_kind_of_block_can_be_made(tree, what):
    (tree / "README.md").write_text(block(f"cpu/layer.json{what}"))
    generate_tables.main([], tree)
    text = (tree / "README.md").read_text()
    assert "layer.json](benchmarks/results/cpu/layer.json)" in text
    assert len(text.splitlines()) > 6


def test_a_missing_file_is_said_and_still_compared(tree):
    (tree / "README.md").write_text(block("cpu/model.json"))
    generate_tables.main([], tree)
    said = "Not measured yet: there is no benchmarks/results/cpu/model.json."
    assert said in (tree / "README.md").read_text()
    generate_tables.main(["--check"], tree)
    saved(tree / "benchmarks/results/cpu", "model.json", content("of the future", [{"a": 1}]))
    with pytest.raises(SystemExit, match="stale: README.md"):
        generate_tables.main(["--check"], tree)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- results: cpu/layer.json -->\n", "must be one of a pair"),
        ("<!-- end of results -->\n", "must be one of a pair"),
        (block("cpu/layer.json; Nothing"), "must name one of the tables '.*got 'Nothing'"),
        ("<!-- figure: cpu/layer.json; lora; hours -->1<!-- end -->", "must be one line .* got 0"),
        ("<!-- figure: cpu/layer.json; ours -->1<!-- end -->", "must be one line .* got 2"),
        ("<!-- figure: cpu/none.json; lora; ours -->1<!-- end -->", "must name a file under"),
    ],
)
def test_a_mark_that_is_wrong_stops_it_before_anything_is_written(tree, text, words):
    (tree / "README.md").write_text(block("cpu/layer.json"))
    (tree / "docs" / "a.md").write_text(text)
    with pytest.raises(SystemExit, match=f"a.md: .*{words}"):
        generate_tables.main([], tree)
    assert (tree / "README.md").read_text() == block("cpu/layer.json")


def test_the_path_says_which_other_operators_ran_by_kernels_of_ours():
    found = row("oft")
    found["contenders"]["ours"]["calls"] = [
        "block_rotate backward: native, 1", "block_rotate forward: native, 1",
        "decomposed_linear forward: aten, 1", "kron forward: aten, 2",
    ]  # fmt: skip
    (line,) = layer_tables.tables(content(rows=[found]))[0].lines
    assert line[-1] == "a path + block_rotate native"
