"""The stage ``extension`` of gpu-check: the native library on the device.

It is loaded, or built first where nvcc is at hand; its tests run on the device, memcheck and
racecheck over one of them; and the fused GEMM is timed beside what a user has without it.

    cublas          the base product alone, x W^T or dy W
    cublas + addmm  then the rank-r product added to it
    rank first      the rank-r product written, the base product added with beta = 1
    triton          the fused Triton kernel
    hopper, mma     the fused kernels of csrc/cuda
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_rows import PYTEST, ROOT, SERIAL, Rows, run
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels import native_library
from decomp_kernels.bench import engine, tune

TESTS = ("tests/test_native_operator.py", "tests/test_native_walk.py", "tests/test_native_norm.py")
SANITIZED = "tests/test_native_operator.py::test_odd_shapes_and_ranks"
SHAPES = [(M, N, K, r) for M in (8192, 2048) for N, K in tune.LAYERS for r in (16, 64)]


def extension(args: argparse.Namespace, device: torch.device, path: Path, until: float) -> bool:
    rows = Rows(path, "gpu-check extension", args)
    if not args.dry and not _ready(rows, device, until):
        return False
    jobs = {test: [*PYTEST, str(ROOT / test)] for test in TESTS}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        words = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        jobs[f"compute-sanitizer {tool}"] = [*words, *SERIAL, "-k", "cuda", SANITIZED]
    for name, command in jobs.items():
        if rows.has(name) or time.monotonic() > until - 5:
            continue
        dry = ["--collect-only"] if args.dry else []
        code, out = run([*command, *dry], until - time.monotonic())
        rows.add({"name": name, "code": code, "output": out[-6000:]})
        print(f"{name}: {'ok' if code == 0 else f'exit {code}'}", flush=True)
        if code:
            print(out[-1500:])
    shapes = [(3, 24, 16, 8)] if args.dry else SHAPES if args.full else SHAPES[:1]
    for M, N, K, r in shapes:
        for direction, make in (("forward", _forward), ("backward", _backward)):
            name = f"{direction} {M} x {K} x {N}, r={r}"
            if rows.has(name) or time.monotonic() > until - 5:
                continue
            contenders, failed = [], {}
            for label, call in make(M, N, K, r, device):
                try:
                    call()
                    contenders.append(engine.call(label, call))
                except Exception as error:  # one that cannot run must not lose the others
                    failed[label] = f"{type(error).__name__}: {str(error)[:300]}"
            samples = engine.measure(
                contenders, 3 if args.dry else 40, warmup=5, clock=engine.device_clock(device),
                split=False,
            )  # fmt: skip
            ratios = {c.name: samples.ratio(c.name, against="cublas")._asdict() for c in contenders}
            flops = 2 * M * N * K
            tera = flops / samples.time("cublas").median / 1e3
            rows.add({"name": name, "code": 0, "ratio": ratios, "failed": failed, "tflops": tera})
            shown = "  ".join(f"{label} {ratio['median']:.3f}" for label, ratio in ratios.items())
            print(f"{name}: cublas {tera:.0f} TFLOP/s; {shown}; failed: {sorted(failed)}")
    return all(row["code"] == 0 for row in rows.all) and bool(rows.all)


def _ready(rows: Rows, device: torch.device, until: float) -> bool:
    """Whether the library has code for this device; it is built where it has not and nvcc is."""
    capability = torch.cuda.get_device_capability(device)
    why = native_library.why_not_loaded() or native_library.why_not_on_gpu(capability)
    if why and shutil.which("nvcc"):
        print(f"building: {why}", flush=True)
        arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")
        code, out = run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], until - time.monotonic(),
            DECOMP_KERNELS_CUDA_ARCHS=arch, DECOMP_KERNELS_REQUIRE_NATIVE="1",
        )  # fmt: skip
        for kept in (native_library.record, native_library.why_not_loaded):
            kept.cache_clear()
        why = native_library.why_not_loaded() or native_library.why_not_on_gpu(capability)
        why = why and f"{why}\n{out[-3000:]}" if code else why
    if why:
        rows.add({"name": "library", "code": 1, "output": why, "error": "not built"})
        print(f"no native library for this device: {why}")
    return why is None


def _forward(
    M: int, N: int, K: int, r: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Any]]]:
    x, weight, v, up = _draw(device, (M, K), (N, K), (M, r), (N, r))
    yield "cublas", lambda: F.linear(x, weight)
    yield "cublas + addmm", lambda: F.linear(x, weight).addmm_(v, up.T)
    yield "rank first", lambda: (v @ up.T).addmm_(x, weight.T)
    yield from _ours("fused_forward", lambda call, **o: call(x, weight, v=v, up=up, **o))


def _backward(
    M: int, N: int, K: int, r: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Any]]]:
    dy, weight, dt, down = _draw(device, (M, N), (N, K), (M, r), (r, K))
    yield "cublas", lambda: dy @ weight
    yield "cublas + addmm", lambda: (dy @ weight).addmm_(dt, down)
    yield "rank first", lambda: (dt @ down).addmm_(dy, weight)
    yield from _ours(
        "fused_input_gradient", lambda call, **o: call(dy, weight, dt=dt, down=down, **o)
    )


def _ours(name: str, given: Callable[..., Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Our fused kernels; each is imported when it is first called, where its failure is told."""

    def triton() -> Any:
        from decomp_kernels.kernels.triton import fused_forward, fused_input_gradient

        files = {"fused_forward": fused_forward, "fused_input_gradient": fused_input_gradient}
        return given(getattr(files[name], name))

    def native(form: str) -> Any:
        from decomp_kernels.kernels.native import decomposed_linear_fused

        return given(getattr(decomposed_linear_fused, name), form=form)

    yield "triton", triton
    yield "hopper", lambda: native("hopper")
    yield "mma", lambda: native("mma")


def _draw(device: torch.device, *sizes: tuple[int, int]) -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(size, generator=gen, device=device).mul_(size[1] ** -0.5).bfloat16()
        for size in sizes
    ]
