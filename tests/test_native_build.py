"""What the build of the native library refuses and says, without compiling anything; records."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from decomp_kernels import native_library
from decomp_kernels.cli.main import main

ROOT = Path(__file__).parent.parent


def plan(**settings):
    """setup.py asked for its version: it looks at the machine and its settings before that."""
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **settings},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"DECOMP_KERNELS_CUDA_ARCHS": "hopper"}, "must list architectures such as 80;90a;100a"),
        (
            {"DECOMP_KERNELS_HOPPER_INSTANCES": "foo"},
            "must list numbers from 0 to 15",
        ),
        ({"DECOMP_KERNELS_HOPPER_INSTANCES": "3 16"}, "got '16'"),
        (
            {"CXX": "/no/such", "DECOMP_KERNELS_REQUIRE_NATIVE": "1"},
            "cannot be built: missing when the package was built: a C++20 compiler",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_right_are_refused(settings, says):
    done = plan(**settings)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "settings",
    [{"CXX": " "}, {"CXX": "/no/such"}, {"DECOMP_KERNELS_HOPPER_INSTANCES": "3,11;0"},
     {"DECOMP_KERNELS_CUDA_ARCHS": ""}, {"DECOMP_KERNELS_CUDA_ARCHS": "80, 90a;100f 80+PTX"}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_odd_are_taken(settings):
    done = plan(**settings)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(native_library.why_not_autograd() is not None, reason="nothing to build with")
def test_another_torch_compiles_the_autograd_node_anew_and_no_kernel():
    code = (
        "import runpy, sys; from pathlib import Path; import torch\n"
        "sys.argv = ['setup.py', '--version']\n"
        "made = runpy.run_path('setup.py')\n"
        "for torch.__version__ in ('2.11.0', '2.12.0'):\n"
        "    print(made['ninja_file'](made['PLAN'], Path('one.so'), Path('two.so')), end='#')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    files = done.stdout.split("#")
    changed = set(files[0].splitlines()) ^ set(files[1].splitlines())
    (node,) = re.findall(r"autograd_decomposed_linear\.o: .*\n(.*)", files[0])
    assert node in changed
    assert not any("-DDK_LEVEL" in line or "DTORCH_TARGET" in line for line in changed)


@pytest.mark.parametrize("text", ["{bad", "", "[1]", '{"missing": null}', None], ids=str)
@pytest.mark.parametrize("library", [None, b"", b"no library"], ids=str)
def test_a_damaged_installation_is_library_calls_and_says_so(native_folder, capsys, text, library):
    if text is not None:
        (native_folder / "build.json").write_text(text)
    if library is not None:
        native_library.PATH.write_bytes(library)
    why = native_library.why_not_loaded()
    assert why.startswith("the native library was not built" if library is None else "libdecomp_")
    assert native_library.cpu_level() is None
    assert native_library.build_info() is None
    assert main(["info"]) == 0 and "native library  none: " in capsys.readouterr().out


def test_a_library_of_another_version_is_not_used(native_folder, monkeypatch):
    native_library.PATH.write_bytes(b"as long as its record says")
    (native_folder / "build.json").write_text(json.dumps({"bytes": 26}))
    monkeypatch.setattr(native_library.torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native_library, "OPERATORS", ("cpu_level", "of_tomorrow"))
    assert "of another version, without" in native_library.why_not_loaded()
