"""A further member of PEFT's PeftType, under every Python that is found."""

import enum
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from decomp_kernels.interop.peft.enum_member import add_member

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def _pythons():
    """One interpreter for each version that is there, the running one always among them."""
    running = "{}.{}".format(*sys.version_info)
    found = {running: sys.executable}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        on_path = shutil.which(f"python{version}")
        installed = sorted(pyenv.glob(f"{version}.*/bin/python"))
        for python in [*([on_path] if on_path else []), *map(str, installed)]:
            says = subprocess.run([python, "--version"], capture_output=True, text=True)
            if version not in found and says.stdout.startswith(f"Python {version}."):
                found[version] = python
    return found


PYTHONS = _pythons()

# Both files need nothing but the standard library, so any Python can run them.
UNDER = """
import copy, importlib.util, json, pickle, sys

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

add_member = load("enum_member", sys.argv[1]).add_member
PeftType = load("peft_types", sys.argv[2]).PeftType
before = list(PeftType)
new = add_member(PeftType, "DK_SSB")
assert add_member(PeftType, "DK_SSB") is new and list(PeftType) == [*before, new]
assert PeftType("DK_SSB") is PeftType["DK_SSB"] is PeftType.DK_SSB is new
assert new in PeftType and "DK_SSB" in list(PeftType) and len(PeftType) == len(before) + 1
assert isinstance(new, PeftType) and isinstance(new, str) and new == "DK_SSB" != PeftType.LORA
assert {new: 1}["DK_SSB"] == 1 and {"DK_SSB": 1}[new] == 1
assert (repr(new), str(new)) == ("<PeftType.DK_SSB: 'DK_SSB'>", "PeftType.DK_SSB")
assert json.dumps({"peft_type": new}) == '{"peft_type": "DK_SSB"}'
assert pickle.loads(pickle.dumps(new)) is copy.deepcopy(new) is copy.copy(new) is new
for refused in ("DK_NONE", "dk_ssb"):
    try:
        PeftType(refused)
    except ValueError:
        continue
    raise AssertionError(refused)
for old in before:
    assert PeftType(old.value) is PeftType[old.name] is getattr(PeftType, old.name) is old
print(sys.version_info[:2], len(PeftType))
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_the_new_member_is_like_the_others(version):
    (folder,) = find_spec("peft").submodule_search_locations
    files = (ROOT / "decomp_kernels/interop/peft/enum_member.py", f"{folder}/utils/peft_types.py")
    done = subprocess.run(
        [PYTHONS[version], "-I", "-c", UNDER, *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"({version.replace('.', ', ')})")


class Colour(str, enum.Enum):  # noqa: UP042 - as PeftType is
    RED = "RED"


class Odd(str, enum.Enum):  # noqa: UP042
    """Its members are found in no dict by their strings, which PEFT relies on."""

    RED = "RED"

    def __hash__(self):
        return 7


def test_members_have_their_own_order_and_values():
    blue = add_member(Colour, "BLUE")
    assert [*Colour] == [Colour.RED, blue]
    assert Colour.BLUE is Colour("BLUE") is blue


def test_an_enum_that_works_otherwise_is_left_as_it_was():
    before = (dict(Odd.__members__), set(vars(Odd)), dict(Odd._value2member_map_))
    with pytest.raises(RuntimeError, match="Odd cannot take a member 'BLUE' here: comparison with"):
        add_member(Odd, "BLUE")
    assert before == (dict(Odd.__members__), set(vars(Odd)), dict(Odd._value2member_map_))
    with pytest.raises(ValueError, match="BLUE"):
        Odd("BLUE")
    assert not hasattr(Odd, "BLUE")


class Number(enum.Enum):
    ONE = 1


@pytest.mark.parametrize("wrong", [Number, str, "PeftType", None], ids=repr)
def test_anything_but_an_enum_of_strings_is_refused(wrong):
    with pytest.raises(TypeError, match="cls must be an Enum of strings, got"):
        add_member(wrong, "TWO")
