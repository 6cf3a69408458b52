"""What an installation holds on four machines: python scripts/check_install.py [--archs ...]

    isolated      pip install .                             pure Python, no torch in the build
    no-compiler   pip install --no-build-isolation .        with a PATH that holds no compiler
    compiler      the same                                  with a C++ compiler, without nvcc
    nvcc          the same, DECOMP_KERNELS_CUDA_ARCHS set   every device kernel for these GPUs

Each builds a wheel, unpacks it, and asks the copy what it has, and whether its library loads and
runs on this machine.  Of the last one the spill counts that ptxas printed are read: no kernel may
spill.  It also looks for symbols that would keep the library from loading where there is no GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "80;90a;100a;80+PTX"
INSTANCES = "3 11"  # of the Hopper GEMM: forward and input gradient, bf16, 128 x 256 cooperative
COMPILERS = re.compile(r"(.*-)?(c\+\+|g\+\+|gcc|cc|clang|clang\+\+|cl|icpx)(-[\d.]+)?|c\d\d")
ASK = """
import json, sys
import torch
from decomp_kernels import native_library
import decomp_kernels
assert decomp_kernels.__file__.startswith(sys.argv[1]), decomp_kernels.__file__
why = native_library.why_not_loaded()
found = {"why_not": why, "record": native_library.record(), "info": native_library.build_info()}
if why is None:
    found["level"] = native_library.cpu_level()
    x, down = torch.randn(5, 12), torch.randn(3, 12)
    t, _ = native_library.ops().down_projection(x, down, None, None, 1.0, 0.0, "identity")
    torch.testing.assert_close(t, x @ down.T)
    assert native_library.why_not_autograd() is None, native_library.why_not_autograd()
    nothing = [None] * 7  # bias, the branch, the scales, the seed
    y = native_library.autograd_node()(x, torch.eye(12), *nothing, 1.0, 0.0, 0)
    torch.testing.assert_close(y, x)
print(json.dumps(found))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--archs", default=ARCHS, help=f"of the case nvcc (default {ARCHS})")
    parser.add_argument("--all-instances", action="store_true", help="of the Hopper GEMM, not two")
    args = parser.parse_args()
    failed = 0
    for name in args.only or CASES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            problems, said = CASES[name](Path(folder), args)
        took = time.monotonic() - start
        print(f"{name:<12} {'FAILED' if problems else 'ok':<7} {took:5.0f} s   {said}", flush=True)
        for problem in problems:
            print(f"             {problem}")
        failed += bool(problems)
    return 1 if failed else 0


def isolated(folder: Path, args: argparse.Namespace) -> tuple[list[str], str]:
    found = install(folder, [], os.environ["PATH"], {})
    return pure(found, "torch")


def no_compiler(folder: Path, args: argparse.Namespace) -> tuple[list[str], str]:
    path = masked(folder, lambda name: COMPILERS.fullmatch(name) or name == "nvcc")
    found = install(folder, ["--no-build-isolation"], path, {})
    return pure(found, "compiler")


def compiler(folder: Path, args: argparse.Namespace) -> tuple[list[str], str]:
    path = masked(folder, lambda name: name == "nvcc")
    found = install(folder, ["--no-build-isolation"], path, {"DECOMP_KERNELS_CUDA_ARCHS": "80"})
    problems = native(found)
    if "nvcc was not on the PATH" not in found["record"]["missing"].get("device kernels", ""):
        problems.append(f"it does not say that nvcc is missing: {found['record']}")
    return problems, f"host kernels at {found.get('level')}; without device kernels"


def nvcc(folder: Path, args: argparse.Namespace) -> tuple[list[str], str]:
    settings = {"DECOMP_KERNELS_CUDA_ARCHS": args.archs}
    if not args.all_instances:
        settings["DECOMP_KERNELS_HOPPER_INSTANCES"] = INSTANCES
    found = install(folder, ["--no-build-isolation"], os.environ["PATH"], settings)
    problems = native(found)
    if found["record"].get("missing"):
        problems.append(f"left out: {found['record']['missing']}")
    kernels, spilled = registers()
    problems += [f"spills: {kernel}" for kernel in spilled]
    if not kernels:
        problems.append("no device kernel was compiled")
    info = found["info"] or {}
    said = (
        f"{kernels} kernels for {info.get('cuda_archs')}, CUTLASS {info.get('cutlass')}, 0 spills"
    )
    return problems, said


CASES = {"isolated": isolated, "no-compiler": no_compiler, "compiler": compiler, "nvcc": nvcc}


def install(folder: Path, options: list[str], path: str, settings: dict[str, str]) -> dict:
    """Build a wheel, unpack it, and ask what it has."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DECOMP_KERNELS_") and name not in ("CXX", "PYTHONPATH")
    }
    environment |= {"PATH": f"{Path(sys.executable).parent}:{path}", **settings}
    made = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--verbose", *options,
         "--wheel-dir", str(folder / "wheel"), str(ROOT)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"pip wheel failed:\n{made.stdout[-4000:]}{made.stderr[-2000:]}")
    (wheel,) = (folder / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    asked = subprocess.run(
        [sys.executable, "-c", ASK, str(folder / "unpacked")], cwd=folder, text=True,
        env=environment | {"PYTHONPATH": str(folder / "unpacked")}, capture_output=True,
    )  # fmt: skip
    if asked.returncode:
        raise SystemExit(f"the installed copy fails:\n{asked.stderr[-3000:]}")
    found = json.loads(asked.stdout.splitlines()[-1])
    told = [line for line in made.stdout.splitlines() if "decomp_kernels: without" in line]
    return found | {"wheel": wheel.name, "told": told, "log": made.stdout + made.stderr}


def pure(found: dict, word: str) -> tuple[list[str], str]:
    """An installation without a library, which says why."""
    problems = []
    if found["why_not"] is None or word not in found["why_not"]:
        problems.append(f"it must be without a library and name {word}: {found['why_not']}")
    if not found["wheel"].endswith("-none-any.whl"):
        problems.append(f"the wheel is not pure Python: {found['wheel']}")
    if "decomp_kernels: without host kernels" not in found["log"]:
        problems.append("the build does not say what is left out")
    return problems, f"pure Python: {found['why_not']}"


def native(found: dict) -> list[str]:
    problems = [] if found["why_not"] is None else [f"no library: {found['why_not']}"]
    if found["info"] is None:
        problems.append("build_info() is not there")
    return problems + symbols()


def symbols() -> list[str]:
    """Undefined symbols of the library that no machine, or not every one, has."""
    library = next((ROOT / "build").rglob("libdecomp_kernels_native.so"))
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", str(library)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wrong = re.compile(r"\bU ((at|c10)::|cu[A-Z]|cuda[A-Z]|Py[A-Z_]|_Py)")
    return [f"undefined symbol {line.split(maxsplit=1)[1]}" for line in listed.splitlines()
            if wrong.search(line)]  # fmt: skip


def registers() -> tuple[int, list[str]]:
    """(kernels compiled, those that spill) of what ptxas printed, beside the objects."""
    count, spilled = 0, []
    for log in sorted((ROOT / "build" / "native").glob("*.o.log")):
        kernel = ""
        for line in log.read_text().splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                kernel, count = (
                    f"{log.name.removesuffix('.o.log')} {entry[1]} {entry[2]}",
                    count + 1,
                )
            if (bytes_ := re.search(r"(\d+) bytes spill stores, (\d+) bytes", line)) and (
                bytes_[1] != "0" or bytes_[2] != "0"
            ):
                spilled.append(f"{kernel}: {line.strip()}")
    return count, spilled


def masked(folder: Path, hidden) -> str:
    """A PATH of links to everything on the PATH whose name is not ``hidden``."""
    links = folder / "bin"
    links.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = links / program.name
            if os.access(program, os.X_OK) and not hidden(program.name) and not link.exists():
                link.symlink_to(program)
    return str(links)


if __name__ == "__main__":
    raise SystemExit(main())
