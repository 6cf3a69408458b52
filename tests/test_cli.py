"""The command itself: methods, info, bench and what it imports."""

import json
import os
import subprocess
import sys

import pytest

import decomp_kernels as dk
from decomp_kernels.cli.main import main


def run(capsys, *arguments) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_methods_lists_the_registry(capsys):
    printed = run(capsys, "methods")
    for name, cls in dk.methods().items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert cls.formula in line
        assert cls.trains in line
        assert cls.citation in line
    assert "mergeable" in printed.splitlines()[0]


def test_methods_as_markdown_is_one_table(capsys):
    printed = run(capsys, "methods", "--markdown")
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in lines}
    assert len(lines) == 2 + len(dk.methods())
    assert len(columns) == 1


def test_one_method_shows_its_options(capsys):
    printed = run(capsys, "methods", "dora")
    assert "arXiv:2402.09353" in printed
    assert "norm_grad = False" in printed


def test_info_says_what_is_here(capsys):
    found = json.loads(run(capsys, "info", "--json"))
    assert found["methods"] == len(dk.methods())
    assert found["packages"].keys() >= {"triton", "peft", "transformers"}
    assert "reference" in found["implementations"]["available"]
    printed = run(capsys, "info")
    assert found["torch"] in printed
    assert found["machine"]["cpu"] in printed


def test_bench_has_its_own_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "layer", "--help"])
    assert stopped.value.code == 0
    assert "--shape" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["methods", "lorra"], "unknown method 'lorra'"),
        (["train", "--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, arguments, said):
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_command_imports_what_it_runs_and_no_more():
    """transformers, peft and matplotlib take seconds; help and the tables do without them."""
    script = (
        "import sys; from decomp_kernels.cli.main import main; main(['methods'])\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'triton', 'yaml'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
