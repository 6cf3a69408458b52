"""Builds the native library of csrc/ where this machine can; the rest is in pyproject.toml.

Optional: what cannot be built is left out, the install succeeds, and decomp_kernels/kernels/native/
build.json says what was built and what is missing (``decomp-kernels info`` shows it).

    pip install .                          pure Python: the build's own environment holds no torch
    pip install --no-build-isolation .     host kernels, with a C++20 compiler, ninja and pybind11
    DECOMP_KERNELS_CUDA_ARCHS="80;90a" pip install --no-build-isolation .
                                           and the device kernels, with nvcc.  Not set: those of
                                           the GPUs at hand.  "80+PTX" adds PTX; "": none
    DECOMP_KERNELS_HOPPER_INSTANCES="3 11" of the Hopper GEMM's 16 tiles and dtypes; not set: all
    MAX_JOBS=4                             compilations at a time
    CXX, CXXFLAGS, LDFLAGS                 as ever
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = "decomp_kernels.kernels.native"
LIBRARY = "libdecomp_kernels_native.so"
AUTOGRAD = "libdecomp_kernels_autograd.so"  # for this PyTorch alone: its autograd is not stable
RECORD = "build.json"
ABI_TARGET = "2.11"  # the oldest PyTorch that is supported
ABI_MACRO = "0x020b000000000000"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
LEVELS["avx512_bf16"] = [*LEVELS["avx512"], "-mavx512bf16"]
REQUIRED = os.environ.get("DECOMP_KERNELS_REQUIRE_NATIVE") == "1"
CXXFLAGS, LDFLAGS = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")
DEPENDENCIES = "\n depfile = $out.d\n deps = gcc"
# What ptxas says of registers and spills is kept beside each object.
NVCC = "$nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }"
HOPPER_INSTANCE = "hopper_instance"
HOPPER_INSTANCES = 16  # two products, two dtypes, four tiles (csrc/common/hopper_tiles.h)
HOPPER = "hopper_"  # files of that name hold instructions that sm_90a alone has


class Plan:
    """What this machine can build, and why not the rest."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}  # part: why it is left out
        self.compiler = self._compiler()
        self.archs = self._archs() if self.compiler else []
        self.nvcc = shutil.which("nvcc") if self.archs else None
        self.cutlass = self._cutlass() if "90a" in self.archs else None
        self.instances = self._instances()
        self.autograd: dict[str, object] = {}  # what is recorded of csrc/autograd
        if why := self.missing.get("host kernels"):
            self.missing["autograd node"] = why
        if self.missing.get("host kernels") and REQUIRED:
            raise SystemExit(f"the native library cannot be built: {self.missing['host kernels']}")

    def _compiler(self) -> str | None:
        found = filter(shutil.which, ("c++", "g++", "clang++"))
        compiler = os.environ.get("CXX", "").strip() or next(found, "")
        needed = {
            "torch": find_spec("torch") and "torch",
            "ninja": shutil.which("ninja") or find_spec("ninja"),
            "pybind11": find_spec("pybind11"),
            "a C++20 compiler (g++ or clang++)": compiler and shutil.which(compiler.split()[0]),
        }
        absent = [name for name, found in needed.items() if not found]
        if sys.platform != "linux":
            absent = [f"Linux (this is {sys.platform})"]
        if absent:
            self.missing["host kernels"] = (
                f"missing when the package was built: {', '.join(absent)}"
            )
            self.missing["device kernels"] = self.missing["host kernels"]
        return None if absent else compiler

    def _archs(self) -> list[str]:
        """ "80", "90a", "80+PTX": of the environment, or of the GPUs at hand."""
        asked = os.environ.get("DECOMP_KERNELS_CUDA_ARCHS")
        if asked is None and not (archs := _archs_at_hand()):
            self.missing["device kernels"] = (
                "no GPU was at hand when the package was built, and DECOMP_KERNELS_CUDA_ARCHS was "
                'not set (such as "80;90a;100a;80+PTX")'
            )
            return []
        if asked is not None:
            archs = [arch for arch in re.split(r"[;,\s]+", asked) if arch]
            wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch)]
            if wrong:
                raise SystemExit(
                    "DECOMP_KERNELS_CUDA_ARCHS must list architectures such as 80;90a;100a;80+PTX, "
                    f"got {wrong[0]!r}"
                )
            if not archs:
                self.missing["device kernels"] = "DECOMP_KERNELS_CUDA_ARCHS was empty"
                return []
        if not shutil.which("nvcc"):
            self.missing["device kernels"] = "nvcc was not on the PATH when the package was built"
            return []
        return archs

    def _instances(self) -> list[int]:
        chosen = os.environ.get("DECOMP_KERNELS_HOPPER_INSTANCES")
        every = [str(number) for number in range(HOPPER_INSTANCES)]
        numbers = every if chosen is None else [n for n in re.split(r"[;,\s]+", chosen) if n]
        if wrong := [number for number in numbers if number not in every]:
            raise SystemExit(
                "DECOMP_KERNELS_HOPPER_INSTANCES must list numbers from 0 to "
                f"{HOPPER_INSTANCES - 1}, such as 3 11, got {wrong[0]!r}"
            )
        return [int(number) for number in numbers]

    def _cutlass(self) -> Path | None:
        try:
            package = metadata.distribution("nvidia-cutlass")
        except metadata.PackageNotFoundError:
            self.missing["Hopper GEMM"] = (
                "the CUTLASS headers were missing when the package was built: "
                "pip install --no-deps nvidia-cutlass==4.2.0.0"
            )
            return None
        return Path(str(package.locate_file("cutlass_library/source")))

    def without_device_kernels(self, why: str) -> None:
        self.archs, self.nvcc, self.cutlass = [], None, None
        self.missing["device kernels"] = why

    def record(self) -> dict[str, object]:
        built = {"built": bool(self.compiler), "cuda_archs": self.archs, "missing": self.missing}
        return built | self.autograd


def _archs_at_hand() -> list[str]:
    """ "90a" of an H200.  Architecture-specific from Hopper on: those carry its instructions."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if not shutil.which(asked[0]):
        return []
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    numbers = {cap.replace(".", "") for cap in found if re.fullmatch(r"\d+\.\d", cap)}
    return sorted(f"{n}a" if int(n) >= 90 else n for n in numbers)


class BuildNative(build_ext):
    """One ninja run for the library without Python symbols and the module that describes it."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        library = module.parent / LIBRARY
        failure = _compile(library, module)
        if failure and PLAN.nvcc and not REQUIRED:  # the host kernels alone
            PLAN.without_device_kernels(failure)
            failure = _compile(library, module)
        if failure and REQUIRED:
            raise SystemExit(f"the native library could not be built: {failure}")
        autograd = library.with_name(AUTOGRAD)
        unbuilt = failure or _compile(library, module, autograd)
        if unbuilt and REQUIRED:
            raise SystemExit(f"the autograd node could not be built: {unbuilt}")
        if unbuilt:
            autograd.unlink(missing_ok=True)
            PLAN.missing["autograd node"] = unbuilt
        else:
            PLAN.autograd = {"torch": _torch_version(), "autograd_bytes": autograd.stat().st_size}
        record = PLAN.record()
        if failure:
            for old in (library, module):  # never an old library under a new record
                old.unlink(missing_ok=True)
            lacking = {"host kernels": failure, "autograd node": failure}
            record |= {"built": False, "cuda_archs": [], "missing": lacking}
            print(f"decomp_kernels: without host kernels: {failure}", file=sys.stderr)
        else:
            record["bytes"] = library.stat().st_size
        _write_record(module.parent / RECORD, record)

    def copy_extensions_to_source(self) -> None:
        """In place: what was built, and nothing older beside it."""
        if not self.extensions:
            return
        built, home = Path(self.build_lib, *PACKAGE.split(".")), ROOT.joinpath(*PACKAGE.split("."))
        modules = {Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        for name in (*modules, LIBRARY, AUTOGRAD, RECORD):
            (home / name).unlink(missing_ok=True)  # a library that is loaded keeps its own file
            if (built / name).exists():
                shutil.copy(built / name, home / name)

    def get_outputs(self) -> list[str]:
        listed = [Path(path).parent / name for path in super().get_outputs()
                  for name in (Path(path).name, LIBRARY, AUTOGRAD, RECORD)]  # fmt: skip
        return [str(path) for path in listed if path.exists()]


def _compile(library: Path, module: Path, *targets: Path) -> str | None:
    """Run ninja, for ``targets`` or for what every machine can build; None, or what went wrong."""
    build = ROOT.resolve() / "build" / "native"  # kept: only what has changed is compiled
    build.mkdir(parents=True, exist_ok=True)
    (build / "build.ninja").write_text(ninja_file(PLAN, library, module))
    jobs = os.environ.get("MAX_JOBS", "").strip()
    if jobs and not jobs.isdigit():
        raise SystemExit(f"MAX_JOBS must be a whole number, got {jobs!r}")
    program = shutil.which("ninja")
    ninja = [program] if program else [sys.executable, "-m", "ninja"]
    made = subprocess.run(
        [*ninja, "-C", str(build), *(["-j", jobs] if jobs else []), *map(str, targets)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    log = build / "build.log"
    log.write_text(made.stdout)
    print(made.stdout)
    if made.returncode == 0:
        return None
    told = (line for line in made.stdout.splitlines() if re.search(r"\b(error|fatal)\b", line))
    return f"compiling failed: {next(told, 'no error was printed').strip()} ({log})"


class BuildPython(build_py):
    """Writes the record where there is nothing to compile."""

    def run(self) -> None:
        super().run()
        if not PLAN.compiler:
            folder = Path(*PACKAGE.split("."))
            folder = (ROOT if self.editable_mode else Path(self.build_lib)) / folder
            folder.mkdir(parents=True, exist_ok=True)
            for name in (LIBRARY, AUTOGRAD):
                (folder / name).unlink(missing_ok=True)
            _write_record(folder / RECORD, PLAN.record())


def _write_record(path: Path, record: dict[str, object]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")
    for part, why in PLAN.missing.items():
        print(f"decomp_kernels: without {part}: {why}", file=sys.stderr)


def ninja_file(plan: Plan, library: Path, module: Path) -> str:
    """Every compilation and the two links."""
    import pybind11
    import torch

    csrc = ROOT.resolve() / "csrc"
    torch_home = Path(torch.__file__).parent
    parts = [csrc / "common", csrc / "cpu", csrc / "cuda", csrc / "ops"]
    includes = " ".join(f"-I'{part}'" for part in parts)
    torch_includes = " ".join(
        f"-isystem '{torch_home / 'include' / rest}'" for rest in ("", "torch/csrc/api/include")
    )
    x86 = "-DDK_X86" if X86 else ""
    cuda = "-DDK_CUDA" if plan.nvcc else ""
    hopper = "-DDK_HOPPER" if plan.cutlass else ""
    common = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {x86} {includes}"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {plan.compiler}",
        f"nvcc = {plan.nvcc or 'nvcc'}",
        f"common = {common} {CXXFLAGS}",
        f"abi = -DTORCH_TARGET_VERSION={ABI_MACRO} {torch_includes}",
        f"rule cxx\n command = $cxx $common $flags -MMD -MF $out.d -c $in -o $out{DEPENDENCIES}",
        f"rule nvcc\n command = {NVCC}{DEPENDENCIES}",
        "rule link\n command = $cxx -shared $in -o $out $flags",
    ]
    objects = []

    def compile_(source: Path, name: str, rule: str, flags: str) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: {rule} {_ninja(source)}\n flags = {flags}")

    cuda_home = _cuda_home(plan.nvcc) if plan.nvcc else None
    cuda_include = f"-isystem '{cuda_home / 'include'}'" if cuda_home else ""
    for source in sorted((csrc / "ops").glob("*.cpp")):
        compile_(source, f"ops_{source.stem}", "cxx", f"$abi {cuda} {hopper} {cuda_include}")
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        levels = LEVELS if X86 else {"generic": []}
        if source.stem == "levels":
            compile_(source, "cpu_levels", "cxx", "")
            continue
        for level, flags in levels.items():
            name = f"cpu_{source.stem}_{level}"
            compile_(source, name, "cxx", " ".join([*flags, f"-DDK_LEVEL={level}"]))
    if plan.nvcc:
        for source in sorted((csrc / "cuda").glob("*.cu")):
            if (own := _nvcc_flags(plan, source)) is None:
                continue
            host = "--compiler-options -fPIC,-fvisibility=hidden"
            flags = f"-std=c++20 -O3 {hopper} {includes} {host} --expt-relaxed-constexpr {own}"
            if source.stem != HOPPER_INSTANCE:
                compile_(source, f"cuda_{source.stem}", "nvcc", flags)
                continue
            for number in plan.instances:  # each is tens of seconds: a compilation of its own
                name = f"cuda_{source.stem}_{number}"
                compile_(source, name, "nvcc", f"{flags} -DDK_HOPPER_INSTANCE={number}")
    against = f"{LDFLAGS} -Wl,--as-needed -L'{torch_home / 'lib'}' -ltorch_cpu -ltorch"
    if cuda_home:
        folders = [folder for name in ("lib64", "lib") if (folder := cuda_home / name).is_dir()]
        against += f" -L'{folders[0]}' -lcudart_static -lrt -ldl -lpthread"
    lines.append(f"build {_ninja(library)}: link {' '.join(objects)}\n flags = {against}")
    facts = {
        "DK_COMPILER": _version(f"{plan.compiler} --version"),
        "DK_CPU_LEVELS": " ".join(LEVELS if X86 else ["generic"]),
        "DK_NVCC": _version("nvcc --version", -2) if plan.nvcc else "",
        "DK_CUDA_ARCHS": " ".join(plan.archs),
        "DK_CUTLASS": metadata.version("nvidia-cutlass") if plan.cutlass else "",
        "DK_ABI_TARGET": ABI_TARGET,
        "DK_TORCH": torch.__version__,
    }
    macros = " ".join(f"""'-D{name}="{value}"'""" for name, value in facts.items())
    python = f"-isystem '{sysconfig.get_path('include')}' -isystem '{pybind11.get_include()}'"
    lines.append(
        f"build build_info.o: cxx {_ninja(csrc / 'build_info.cpp')}\n flags = {python} {macros}"
    )
    lines.append(f"build {_ninja(module)}: link build_info.o\n flags = ")
    lines.append(f"default {_ninja(library)} {_ninja(module)}")
    # ninja does not see that torch's headers change: with its version in the command, another torch
    # compiles anew, instead of an old library under a new record.
    unstable = (
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())} {torch_includes} "
        f"'-DDK_TORCH=\"{torch.__version__}\"'"
    )
    objects.clear()
    for source in sorted((csrc / "autograd").glob("*.cpp")):
        compile_(source, f"autograd_{source.stem}", "cxx", unstable)
    autograd = library.with_name(AUTOGRAD)
    lines.append(
        f"build {_ninja(autograd)}: link {' '.join(objects)}\n flags = {LDFLAGS} "
        f"-L'{torch_home / 'lib'}' -ltorch_cpu -ltorch -lc10"
    )
    return "\n".join(lines) + "\n"


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _ninja(path: Path) -> str:
    """As ninja reads a path."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _nvcc_flags(plan: Plan, source: Path) -> str | None:
    """-gencode for each architecture, and what the Hopper files need; None: not built."""
    archs, flags = plan.archs, ""
    if source.stem.startswith(HOPPER):
        if plan.cutlass is None:
            return None
        archs = ["90a"]
        flags = (
            f"-isystem {plan.cutlass / 'include'} -isystem {plan.cutlass / 'tools/util/include'}"
        )
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags += f" -gencode arch=compute_{number},code={code}"
    return flags + " -Xptxas -v"


def _cuda_home(nvcc: str) -> Path:
    """Where nvcc's headers and libraries are; what is on the PATH may be a script that calls it."""
    asked = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
    return Path(re.findall(r"TOP=(\S+)", said)[0]).resolve()


def _version(command: str, line: int = 0) -> str:
    said = subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
    return said.strip().splitlines()[line].replace('"', "") if said.strip() else "unknown"


PLAN = Plan()
setup(
    ext_modules=[Extension(f"{PACKAGE}.build_info", [])] if PLAN.compiler else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
