"""The documents: README's code runs, generated files are current, links and names exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from decomp_kernels.cli import inspect
from decomp_kernels.cli.main import main

ROOT = Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)


README_BLOCKS = _blocks(ROOT / "README.md", "python")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tracked() -> list[Path]:
    """Every file under version control; outside a repository, every file of the source tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
        return [path for path in files if path.exists()]
    folders = ("decomp_kernels", "tests", "docs", "scripts", "benchmarks")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    return [p for p in [*ROOT.glob("*.*"), *inside] if p.is_file() and p.suffix != ".pyc"]


def test_readme_has_code():
    assert len(README_BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(README_BLOCKS)))
def test_readme_code_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(README_BLOCKS[number], f"README.md, python block {number + 1}", "exec")
    exec(code, {"__name__": "__main__"})


def test_generated_documents_are_current():
    """Its message says what is stale; `make docs` writes them anew."""
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", TEXTS, ids=_name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        found = (path.parent / file) if file else path
        assert found.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.M)
            anchors = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert anchor in anchors, f"{path.name}: {target}"


@pytest.mark.parametrize("path", TEXTS, ids=_name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[^`\n]*`|\s+#|\s*$)", _code(path), re.M))
    assert named <= targets


def _code(path: Path) -> str:
    """What stands in backticks and in fenced blocks."""
    text = path.read_text("utf-8")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return "\n".join([*spans, *_blocks(path, "bash")])


@pytest.mark.parametrize("path", TEXTS, ids=_name)
def test_named_files_and_tests_exist(path):
    """`tests/test_x.py::test_y` in a text names a test that is there."""
    for file, test in re.findall(
        r"\b((?:tests|benchmarks|decomp_kernels|docs|scripts)/[\w/.-]+\.\w+)(?:::(\w+))?",
        _code(path),
    ):
        if "lora_xs" in file:  # CONTRIBUTING's example, made below
            continue
        assert (ROOT / file).exists(), f"{path.name} names {file}"
        if test:
            assert re.search(rf"def {test}\b", (ROOT / file).read_text("utf-8")), f"{file}::{test}"


# What belongs to one machine or one workplace and would puzzle a reader.
FOREIGN = re.compile(
    r"/work/|/root/|/home/|/opt/|/Users/|[^.]\./?shared/|\bissues? (show|tool|tracker)\b"
    r"|\bdesign\.md|\bmethods\.md section|\becosystem\.md|\bstyle\.md|pypi\.org|pythonhosted"
    r"|download\.pytorch\.org|\bthe (brief|sketch|lead)\b"
)


def test_no_file_speaks_of_a_machine_or_a_workplace():
    found = []
    for path in _tracked():
        if path == Path(__file__) or path.suffix in (".png", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if FOREIGN.search(line):
                found.append(f"{_name(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_status_accounts_for_every_claim():
    """Each row has a claim, what shows it, and what is not shown."""
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "status.md").read_text("utf-8"), re.M)
    rows = [row.split(" | ") for row in rows if not set(row) <= set("-| ")]
    assert len(rows) > 10
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)


def test_a_method_is_one_file_and_one_test(tmp_path):
    """CONTRIBUTING's example, taken literally: its two files and no other edit."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```", text, re.M | re.S)
    assert [name.split("/")[0] for name, _ in files] == ["decomp_kernels", "tests"]
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("decomp_kernels", "tests", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in files:
        assert not (tmp_path / name).exists(), f"{name} is taken: choose another example"
        (tmp_path / name).write_text(code, "utf-8")
    (stem,) = {Path(name).stem.removeprefix("test_") for name, _ in files}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "tests/test_contract.py", f"tests/test_{stem}.py", "-k", stem],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 20, done.stdout[-500:]
    assert "skipped" not in done.stdout


def test_the_table_of_compilations_has_every_kernel_on_every_architecture():
    text = (ROOT / "docs" / "triton.md").read_text().split("<!-- inspect -->")[1]
    assert ", 0 with problems." in text
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) of (\d+) \|", text, re.MULTILINE)
    assert {row[:2] for row in rows} == {(k, a) for k in inspect.KERNELS for a in inspect.LIMITS}
    assert all(done == asked for _, _, done, asked in rows)


SHOWN = [
    pytest.param(*shown, id=f"{path.name}-{number}")
    for path in TEXTS
    for number, shown in enumerate(
        re.findall(
            r"```bash\n(decomp-kernels (?:explain|plan) [^`]*?)\n```\n\n```text\n(.*?)\n```",
            path.read_text("utf-8"),
            re.DOTALL,
        )
    )
]


def test_documents_show_what_commands_print():
    assert len(SHOWN) >= 3


@pytest.mark.parametrize(("command", "text"), SHOWN)
def test_what_a_command_prints_is_what_the_document_shows(command, text, capsys):
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.rstrip() == text
