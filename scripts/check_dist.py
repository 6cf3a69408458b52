"""Checks what was built: python scripts/check_dist.py dist

The wheel holds every file of the package and nothing else, declares what it must, and works when it
is imported from its own archive.  The sdist holds what is needed to build, test and read.
"""

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE_FILES = {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "*.json", "py.typed")
    for path in (ROOT / "decomp_kernels").rglob(pattern)
} - {"decomp_kernels/kernels/native/build.json"}  # made by the build
NATIVE = "decomp_kernels/kernels/native/"
SDIST_FILES = PACKAGE_FILES | {
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "*.toml", "*.txt", "setup.py", "LICENSE", "Makefile", "docs/*.*",
                    "scripts/*.py", "tests/*.py", "tests/native/*.*", "benchmarks/*.py",
                    "csrc/*.cpp", "csrc/*/*.*")
    for path in ROOT.glob(pattern)
}  # fmt: skip
REQUIRED = {"torch", "safetensors", "triton"}


def check_wheel(path: Path) -> list[str]:
    problems = []
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    held = {name for name in names if not name.startswith(info)}
    made = {name for name in held if name.startswith(NATIVE) and name not in PACKAGE_FILES}
    if unknown := [name for name in made if not name.endswith(("build.json", ".so"))]:
        problems.append(f"the build made what it should not: {unknown}")
    if f"{NATIVE}build.json" not in made:
        problems.append("the build left no record of what it built")
    held -= made
    problems += [f"the wheel lacks {name}" for name in sorted(PACKAGE_FILES - held)]
    problems += [f"the wheel should not hold {name}" for name in sorted(held - PACKAGE_FILES)]
    if f"{info}/licenses/LICENSE" not in names:
        problems.append("the wheel lacks LICENSE")
    if metadata["License-Expression"] != "Apache-2.0":
        problems.append(f"the licence is declared as {metadata['License-Expression']}")
    if metadata["Requires-Python"] != ">=3.11":
        problems.append(f"Requires-Python is {metadata['Requires-Python']}")
    declared = metadata.get_all("Requires-Dist", [])
    core = {line.split(">")[0].split("=")[0].strip() for line in declared if "extra ==" not in line}
    if core != REQUIRED:
        problems.append(f"a plain installation requires {sorted(core)}, not {sorted(REQUIRED)}")
    if not any(line.startswith("triton") and "Linux" in line for line in declared):
        problems.append("triton must be required on Linux alone")
    if "decomp-kernels = decomp_kernels.cli.main:main" not in entry_points:
        problems.append("the decomp-kernels command is not declared")
    return problems + check_import(path)


def check_import(wheel: Path) -> list[str]:
    """Import the package from the archive itself and adapt a layer with every method."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import decomp_kernels as dk, torch\n"
        "assert dk.__file__.startswith(sys.argv[1]), dk.__file__\n"
        "for method in dk.methods().values():\n"
        "    dk.DecomposedLinear(torch.nn.Linear(8, 8), method())(torch.ones(2, 8))\n"
    )
    command = [sys.executable, "-P", "-c", code, str(wheel.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=wheel.parent)
    return [] if done.returncode == 0 else [f"the wheel does not work:\n{done.stderr[-2000:]}"]


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    return [f"the sdist lacks {name}" for name in sorted(SDIST_FILES - held)]


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    problems = check_wheel(wheel) + check_sdist(sdist)
    for problem in problems:
        print(problem)
    if problems:
        sys.exit(1)
    sizes = ", ".join(
        f"{path.name} {path.stat().st_size / 1024:.0f} KiB" for path in (wheel, sdist)
    )
    print(f"wheel and sdist hold what they should: {sizes}")


if __name__ == "__main__":
    main()
