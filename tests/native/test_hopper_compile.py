"""The Hopper product compiled for sm_90a: registers, shared memory, instructions, what it links.

Needs nvcc and CUTLASS's headers (the nvidia-cutlass wheel), no GPU.  One forward and one input
gradient with dropout, the largest tiles of both; about half a minute each.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
FORWARD, INPUT_GRADIENT = 3, 11  # bfloat16, cooperative 128x256, blocks in pairs
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC",
         "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]  # fmt: skip
INSTRUCTIONS = {
    "HGMMA": "matrix products of a warpgroup",
    "UTMALDG": "loads by the copy engine",
    "UTMASTG": "stores by the copy engine",
    "SYNCS": "barriers that count its bytes",
    "USETMAXREG": "registers handed from the producer to the consumers",
    "STSM": "matrix stores",
}

# Calls the forward where no driver is: the answer must be an error and not a crash.
SHIM = """
#include "hopper_gemm.h"
extern "C" int call_forward(void* p) {
  decomp_kernels::HopperForwardArgs a{};
  a.x = a.weight = a.y = p; a.y = p; a.M = a.N = a.K = 64;
  a.x_stride = a.weight_stride = a.y_stride = 64;
  a.dtype = decomp_kernels::Dtype::kBFloat16; a.shape = 3;
  return decomp_kernels::cuda::launch(a, nullptr, 132, nullptr);
}
"""


def _cutlass() -> Path | None:
    found = find_spec("cutlass_library")
    places = list(found.submodule_search_locations or []) if found else []
    headers = Path(places[0]) / "source" / "include" if places else None
    return headers if headers and (headers / "cutlass" / "cutlass.h").exists() else None


def _tool(name: str) -> str | None:
    """A CUDA tool on the path, or the one that comes with Triton."""
    triton = find_spec("triton")
    places = list(triton.submodule_search_locations or []) if triton else []
    inside = Path(places[0]) / "backends" / "nvidia" / "bin" / name if places else None
    return shutil.which(name) or (str(inside) if inside and inside.exists() else None)


NVCC, CUTLASS, CUOBJDUMP = shutil.which("nvcc"), _cutlass(), _tool("cuobjdump")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(CUTLASS is None, reason="no CUTLASS headers: pip install nvidia-cutlass"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """{instance: (object, what the compiler said)}, the launches under "gemm"."""
    folder = tmp_path_factory.mktemp("hopper_objects")
    made = {}
    for name, source, macros in (
        (FORWARD, "hopper_instance.cu", [f"-DDK_HOPPER_INSTANCE={FORWARD}"]),
        (INPUT_GRADIENT, "hopper_instance.cu", [f"-DDK_HOPPER_INSTANCE={INPUT_GRADIENT}"]),
        ("gemm", "hopper_gemm.cu", []),
    ):
        out = folder / f"hopper_{name}.o"
        said = _run(NVCC, *FLAGS, f"-I{CUTLASS}", *macros, "-c", CUDA / source, "-o", out)
        made[name] = out, said
    return made


@pytest.mark.parametrize("instance", [FORWARD, INPUT_GRADIENT])
def test_registers_and_instructions(objects, instance):
    out, said = objects[instance]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 65536 // 384
    assert "C7510" not in said  # matrix instructions that wait for one another
    sass = _run(CUOBJDUMP, "-sass", out)
    for instruction, meaning in INSTRUCTIONS.items():
        assert instruction in sass, meaning
    assert not re.search(r"\b(LDL|STL)\b", sass)


def test_loads_and_refuses_without_a_driver(objects, tmp_path):
    shim, library = tmp_path / "shim.cu", tmp_path / "hopper.so"
    shim.write_text(SHIM)
    _run(NVCC, *FLAGS, f"-I{CUDA}", "-shared", "-cudart=static", shim,
         *(out for out, _ in objects.values()), "-o", library)  # fmt: skip
    undefined = _run("nm", "-D", "--undefined-only", library)
    assert not re.search(r" U cu", undefined)  # neither libcuda nor libcudart
    assert "libcuda" not in _run("readelf", "-d", library)
    if "libcuda.so.1" in _run("ldconfig", "-p"):
        pytest.skip("there is a driver: a launch would run")
    call = f"import ctypes; print(ctypes.CDLL({str(library)!r}).call_forward(4096))"
    answer = int(_run(shutil.which("python3") or "python", "-c", call))
    assert answer == 801  # cudaErrorNotSupported
