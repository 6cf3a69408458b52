"""Which implementation runs.  The only file that asks what machine this is."""

import os
import sys
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decomp_kernels import native_library, tables

EVERYWHERE = ("reference", "aten")  # what every operator has
TRITON_FORMS = ("triton:passes", "triton:fused")  # an operator with one form has it under both
NATIVE_FORMS = ("native:passes", "native:fused")
IMPLS = ("auto", *EVERYWHERE, *TRITON_FORMS, *NATIVE_FORMS)
VARIABLE = "DECOMP_KERNELS_IMPL"
TAKE_QUANTIZED = ("auto", *EVERYWHERE, "native:passes")  # of the decomposed linear
NOT_NATIVE = ("auto", *EVERYWHERE, *TRITON_FORMS)  # of methods with a weight map
CANDIDATES = tuple(impl for impl in IMPLS if impl not in ("auto", "reference"))  # of a table
INTERPRET = "TRITON_INTERPRET"
ANY = "any"  # the architecture of what no table knows


class Work(NamedTuple):
    """One call of an operator, as the table of implementations knows it."""

    operator: str
    direction: str  # forward or backward
    M: int  # tokens; rows of W for an operator on W alone
    NK: int  # elements of W
    r: int  # rank, 0 without a low-rank branch
    base: str  # dtype of x and W
    adapter: str  # float32, or narrow as the base is
    dropout: bool = False
    scaled: bool = False  # by out_scale


class Choice(NamedTuple):
    impl: str
    why: str
    measured: dict[str, Any] | None = None  # what the table says of the measurement


def choose(
    x: Tensor,
    impl: str = "auto",
    has: Container[str] = EVERYWHERE,
    work: Callable[[], Work] | None = None,
) -> str:
    """The implementation for an operator on ``x``: ``impl`` itself, or what ``auto`` stands for.

    ``auto`` takes the environment variable DECOMP_KERNELS_IMPL where it is set.  Else it takes what
    the table of implementations has for this architecture (on a CPU, the instruction set of the
    native library) and ``work``; where nobody has measured, the composition of library calls.
    has: the implementations of this operator.  A named one is never replaced: RuntimeError where it
    cannot run on ``x`` or the operator has none.
    """
    check(impl)
    if impl == "auto" and VARIABLE not in os.environ:  # what ``decide`` would say, sooner
        return fastest(x, has, work)
    return decide(impl, has, architecture(x.device), work, lambda form: why_not(x, form)).impl


def fastest(x: Tensor, has: Container[str], work: Callable[[], Work] | None) -> str:
    """What the table has for ``work``, whatever the environment says."""
    if work is None:  # asked first: a compiler cannot follow what asks for the architecture
        return "aten"
    arch = architecture(x.device)
    if arch == ANY:
        return "aten"
    chosen = measured_choice(arch, work()).impl
    return chosen if chosen in has and why_not(x, chosen) is None else "aten"


def both_ways(x: Tensor, impl: str, work: Callable[[], Work]) -> tuple[str | None, str | None]:
    """What ``choose`` takes forward and backward, of library calls and the native library's forms.

    work: that of the forward.  None where it takes another form, or raises.
    """
    if impl == "auto" and VARIABLE in os.environ:
        impl = named(impl)
    if impl != "auto":
        able = impl == "aten" or (impl in NATIVE_FORMS and why_not_native(x, impl) is None)
        return (impl, impl) if able else (None, None)
    arch = architecture(x.device)
    if arch == ANY:
        return "aten", "aten"
    forward = work()
    ways = (
        measured_choice(arch, one).impl for one in (forward, forward._replace(direction="backward"))
    )
    first, second = (way if why_not(x, way) is None else "aten" for way in ways)
    return first, second


def decide(
    impl: str,
    has: Container[str],
    arch: str,
    work: Callable[[], Work] | None,
    why_not: Callable[[str], str | None],
) -> Choice:
    """``choose`` for an architecture that need not be at hand, with the reason.

    why_not: why an implementation cannot run there, None where it can.
    """
    asked, impl = impl, named(impl)
    if impl != "auto":
        why = why_not(impl) if impl in has else "this operator has no such implementation yet"
        if why:
            cure = "use impl='aten' or impl='auto'"
            if asked == "auto":
                cure = f"the environment variable {VARIABLE} names it: unset it, or set it to aten"
            raise RuntimeError(f"impl={impl!r} cannot run: {why}; {cure}")
        source = f"the environment variable {VARIABLE}={impl}"
        return Choice(impl, f"named by {source if asked == 'auto' else f'{impl=}'}")
    if arch == ANY:
        why = native_library.why_not_loaded() or "nothing else is known for this device"
        return Choice("aten", f"library calls: {why}")
    if work is None:
        return Choice("aten", "library calls: this operator has no table of measurements")
    chosen = measured_choice(arch, work())
    why = why_not(chosen.impl) if chosen.impl in has else "this operator has none"
    if why:
        return Choice("aten", f"library calls: {chosen.impl} was measured fastest, but {why}")
    return chosen


@lru_cache(maxsize=4096)  # a few a layer; tune clears it
def measured_choice(arch: str, work: Work) -> Choice:
    """What the table has for this call, and whose measurement says so."""
    sizes = {"M": work.M, "NK": work.NK, "r": work.r}
    kinds: dict[str, Any] = {
        "operator": work.operator, "base": work.base, "adapter": work.adapter,
        "dropout": work.dropout, "scaled": work.scaled,
    }  # fmt: skip
    entry = tables.first(tables.IMPLEMENTATIONS, arch, sizes, **kinds)
    measured = entry["measured"] or None
    if measured is None:
        return Choice("aten", f"nobody has measured this on {arch}: library calls")
    why = f"the fastest on {measured['on']}, measured {measured['date']}"
    return Choice(entry[work.direction], why, measured)


def dtype_names(weight: Tensor, small: Tensor) -> tuple[str, str]:
    """The base's and the adapter's dtype as tables have them: float32, or narrow."""
    return tables.width(weight.dtype == torch.float32), tables.width(small.dtype == torch.float32)


def named(impl: str) -> str:
    """``impl``, or the environment variable's in place of ``auto``."""
    check(impl)
    if impl == "auto":
        impl = os.environ.get(VARIABLE) or "auto"  # an empty one is not set
        check(impl, f"the environment variable {VARIABLE}")
    return impl


def check(impl: str, where: str = "impl") -> None:
    if impl not in IMPLS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLS)}, got {impl!r}")


def why_not(x: Tensor, impl: str) -> str | None:
    """Why ``impl`` cannot run on ``x``; None where it can."""
    if impl in EVERYWHERE:
        return None
    return why_not_native(x, impl) if impl in NATIVE_FORMS else why_not_triton(x)


def why_not_triton(x: Tensor) -> str | None:
    if why := why_not_installed():
        return why
    if x.dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, and x is float64"
    if x.device.type == "cpu" and os.environ.get(INTERPRET) != "1":
        return (
            f"x is on the CPU, where Triton runs only as an interpreter (set {INTERPRET}=1 before "
            "the first import of triton)"
        )
    if x.device.type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA and ROCm devices, and x is on {x.device}"
    return None


def why_not_native(x: Tensor, impl: str) -> str | None:
    if why := native_library.why_not_loaded():
        return why
    if x.device.type == "cpu":
        if impl == "native:fused":
            return "it is for GPUs; on the CPU the native form is native:passes"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"host kernels take float32 and bfloat16, and x is {_short(x.dtype)}"
        return None
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels run on CPUs and CUDA devices, and x is on {x.device}"
    if why := why_not_native_on(architecture(x.device), x.dtype, impl):
        return why
    return native_library.why_not_on_gpu(torch.cuda.get_device_capability(x.device))


def why_not_native_on(arch: str, dtype: torch.dtype, impl: str) -> str | None:
    """``why_not_native`` for a GPU that need not be at hand, were the library built for it."""
    if not arch.startswith("sm_"):
        return "its kernels run on CPUs and CUDA devices"
    if dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, and x is float64"
    if impl == "native:fused" and dtype == torch.float32:
        return "its GEMM takes bfloat16 and float16, and x is float32"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def architecture(device: torch.device) -> str:
    """Of a GPU, as compilers name it: "sm_90", "gfx942".  Of a CPU the instruction set of the
    native library, ANY where that is not built, and of everything else.
    """
    if device.type == "cuda":
        return _gpu_architecture(device)
    return native_library.cpu_architecture() or ANY if device.type == "cpu" else ANY


@cache
def _gpu_architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def processors(device: torch.device) -> int:
    """How many programs run side by side; of the interpreter any number, so that some have two."""
    return _gpu_processors(device) if device.type == "cuda" else 3


@cache
def _gpu_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def why_not_installed() -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def base_gemm_first(x: Tensor) -> bool:
    """Whether a GEMM that adds to a filled buffer is slower than one that fills an empty one.

    16-bit on a CPU it is, by 1 % (docs/performance.md): there a low-rank term is better added after
    the base GEMM.  On a GPU the read of the buffer hides under the arithmetic.
    """
    return x.device.type == "cpu" and x.element_size() == 2


def plain_products_by_library(x: Tensor) -> bool:
    """Whether dt^T x with no mask, of operands of one dtype, is left to the library.

    On a CPU the native library's is faster (docs/performance.md, "Host kernels"); on a GPU nobody
    has measured.
    """
    return x.device.type != "cpu"


def block_elements(device: torch.device, on_cpu: int) -> int:
    """Elements of the blocks in which library calls walk a large tensor.

    On a CPU a block stays in cache.  On a GPU it costs a few launches, which it must outlast:
    2^24 elements, 64 MiB as float32 (by arithmetic, not measured).  Without values, on the meta
    device, one block does for all.
    """
    if device.type == "meta":
        return sys.maxsize
    return max(on_cpu, 1 << 24) if device.type == "cuda" else on_cpu


def device_name(device: torch.device) -> str:
    """What the driver calls a GPU; of everything else, its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> int:
    """The device's current stream, 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current GPU: Triton launches there, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
