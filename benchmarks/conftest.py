"""Options of ``pytest benchmarks``, and what its JSON says of the machine."""

import torch

from decomp_kernels.bench import record


def pytest_addoption(parser):
    parser.addoption(
        "--large", action="store_true", help="512 tokens at 1024 and 2048 instead of one small size"
    )
    parser.addoption("--threads", type=int, help="PyTorch's threads (default: its own choice)")


def pytest_configure(config):
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    import cases

    if "shape" in metafunc.fixturenames:
        large = metafunc.config.getoption("--large")
        shapes = cases.LARGE if large else cases.SMALL
        metafunc.parametrize("shape", shapes, ids=["x".join(map(str, shape)) for shape in shapes])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["decomp_kernels"] = record.machine() | {
        "versions": record.versions(),
        "commit": record.commit(),
    }
