"""What tests of the native library share: where it runs, and in which forms and dtypes."""

import pytest
import torch

from decomp_kernels import native_library

built = pytest.mark.skipif(
    native_library.why_not_loaded() is not None,
    reason=str(native_library.why_not_loaded()),
)
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
PLACES = [("cpu", "native:passes")]
DTYPES = {"cpu": ("fp32", "bf16", "bf16-fp32")}
if (
    torch.cuda.is_available()
    and native_library.why_not_on_gpu(torch.cuda.get_device_capability()) is None
):
    PLACES += [("cuda", "native:passes"), ("cuda", "native:fused")]
    DTYPES["cuda"] = ("fp32", "bf16", "fp16", "bf16-fp32", "fp16-fp32")


def dtypes(device, impl):
    """Of tests' operands; the fused GEMM is for 16-bit ones and their own adapters."""
    return [d for d in DTYPES[device] if impl != "native:fused" or d in ("bf16", "fp16")]


def levels():
    """The instruction sets that this processor has."""
    if native_library.why_not_loaded():
        return []
    best = LEVELS.index(native_library.cpu_level())
    return list(LEVELS[: best + 1])
