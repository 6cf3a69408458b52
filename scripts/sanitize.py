"""Host kernels under AddressSanitizer and UndefinedBehaviorSanitizer: python scripts/sanitize.py

The native library is built anew with both, in build/sanitize, and every operator is called with
shapes, dtypes, options and instruction sets that hypothesis makes, for --minutes (default 2).  Each
tensor has a block of memory of its own, so that a read or a write one element outside ends the run.
A first run plants such a read and must be stopped: else the check would prove nothing.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    args = parser.parse_args()
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        print("sanitize: needs g++", file=sys.stderr)
        return 2
    for name in ("csrc", "decomp_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source, target = ROOT / name, COPY / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)  # what ninja keeps is in build/ beside it
            shutil.copytree(source, target, ignore=_not_sources)
        else:
            COPY.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "CXX": compiler, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS,
             "DECOMP_KERNELS_CUDA_ARCHS": "", "DECOMP_KERNELS_REQUIRE_NATIVE": "1"},
    )  # fmt: skip
    if built.returncode:
        print(built.stdout[-4000:])
        return 1
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True,
                       check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=77",  # Python keeps what it likes
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{COPY}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "2",
    }
    shapes = [sys.executable, str(ROOT / "scripts" / "sanitize_shapes.py")]
    planted = subprocess.run(
        [*shapes, "--planted"], env=environment, capture_output=True, text=True, check=False
    )
    if planted.returncode != 77 or "ERROR: AddressSanitizer" not in planted.stderr:
        print("sanitize: a planted read outside was not found:\n" + planted.stderr[-2000:])
        return 1
    print("sanitize: a planted read one element outside is found", flush=True)
    seconds = str(60 * args.minutes)
    return subprocess.run([*shapes, "--seconds", seconds], env=environment, check=False).returncode


def _not_sources(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or name.endswith((".so", "build.json"))]


if __name__ == "__main__":
    raise SystemExit(main())
