"""What every test starts from: one thread, one seed, reproducible hypothesis examples."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite runs one process a core

import pytest
import torch
from hypothesis import HealthCheck, settings
from native_places import PLACES, levels

from decomp_kernels import native_library

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before triton: its kernels run on CPU tensors, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Deadlines measure the machine, not the code.  The same examples each time, so that a failure in CI
# is a failure everywhere; `make check-all` looks further, with new examples each time.
_always = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", max_examples=25, derandomize=True, database=None, **_always)
settings.register_profile("full", max_examples=500, **_always)
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is not installed, nobody asks
def pytest_xdist_auto_num_workers(config):
    """One worker for each core that this process may use, and no more than eight."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _on_the_device(request):
    """Tests of the Triton kernels make their tensors on a GPU where there is one."""
    on_gpu = torch.cuda.is_available() and request.path.name.startswith("test_triton")
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _fresh_start():
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:  # compiled code of one test must not meet another's limits
        torch._dynamo.reset()


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[1]}-{place[0]}")
def place(request):
    """(device, impl) of the native library, the device being the default one."""
    torch.set_default_device(request.param[0])
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=levels())
def level(request):
    """Host kernels at each instruction set that this processor has."""
    best = native_library.cpu_level()
    native_library.set_cpu_level(request.param)
    yield request.param
    native_library.set_cpu_level(best)


@pytest.fixture
def native_folder(monkeypatch, tmp_path):
    """The library's folder, empty; what was asked of the real one is forgotten."""
    kept = [one for one in vars(native_library).values() if hasattr(one, "cache_clear")]
    for one in kept:
        one.cache_clear()
    monkeypatch.setattr(native_library, "_FOLDER", tmp_path)
    monkeypatch.setattr(native_library, "PATH", tmp_path / native_library.PATH.name)
    yield tmp_path
    monkeypatch.undo()
    for one in kept:
        one.cache_clear()


@pytest.fixture
def threads():
    """Numbers of threads to try; torch's own is as it was afterwards."""
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


@pytest.fixture
def measured_level():
    """The instruction set for which ``auto`` has measurements of host kernels."""
    if (arch := native_library.cpu_architecture()) != "avx512_bf16":
        pytest.skip(f"measured at avx512_bf16 alone, this machine has {arch}")
