"""The scale suite: one size grows, the others stay, and each point is an interleaved run.

A point is one method on a stack of adapted linears, forward + backward.  Its contenders: the frozen
stack, an identical second one (the control), ours, and PEFT's layers, or the written-out formula of
what PEFT lacks.  The axes: M tokens, N out, K in, r the rank, layers of a stack of square
linears, and ranks, processes that reduce the adapter's gradients (bench/ranks.py).
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from decomp_kernels.bench import engine, formulas, memory, peers
from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT, leave_the_start
from decomp_kernels.bench.engine import CONTROL, FROZEN
from decomp_kernels.bench.observed import OPERATOR, observe
from decomp_kernels.explanation import explain
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods import methods
from decomp_kernels.methods.base import Method

AXES = ("M", "N", "K", "r", "layers", "ranks")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Sizes = Mapping[str, Sequence[int]]

CPU_SIZES: Sizes = {  # a minute an axis of three methods on two cores
    "M": (64, 128, 256, 512, 1024, 2048),
    "N": (128, 256, 512, 1024, 2048, 4096),
    "K": (128, 256, 512, 1024, 2048, 4096),
    "r": (4, 8, 16, 32, 64, 128),
    "layers": (1, 2, 4, 8),
    "ranks": (1, 2, 3, 4),
}
QUICK_SIZES: Sizes = {
    "M": (32, 64, 128), "N": (64, 128, 256), "K": (64, 128, 256), "r": (2, 4, 8),
    "layers": (1, 2, 3), "ranks": (1, 2),
}  # fmt: skip
GPU_SIZES: Sizes = {
    "M": (512, 1024, 2048, 4096, 8192, 16384),
    "N": (1024, 2048, 4096, 8192, 16384),
    "K": (1024, 2048, 4096, 8192, 16384),
    "r": (8, 16, 32, 64, 128, 256),
    "layers": (1, 2, 4, 8, 16),
    "ranks": (1, 2, 4, 8),
}


@dataclass(frozen=True)
class Point:
    """One measurement: ``axis`` is what grows in its series, and ``size`` how far it is here."""

    method: str
    axis: str
    size: int
    shape: tuple[int, int, int]  # M tokens (of one process), K in, N out
    r: int
    layers: int
    ranks: int
    dtype: str

    @property
    def label(self) -> str:
        return f"{self.method}, {self.axis} = {self.size}"

    @property
    def described(self) -> dict[str, Any]:
        """As a results file has it."""
        return asdict(self) | {"label": self.label}

    def make(self) -> Method:
        """The method with this point's rank and alpha = 2 r, where it has them."""
        cls = methods()[self.method]
        known = {field.name for field in fields(cls)}
        wanted = {"r": self.r, "alpha": 2.0 * self.r, "target_r": max(1, self.r // 2)}
        return cls(**{name: value for name, value in wanted.items() if name in known})


def points(
    names: Iterable[str],
    axes: Iterable[str],
    sizes: Sizes,
    *,
    shape: tuple[int, int, int],
    r: int,
    layers: int,
    dtype: str,
) -> Iterator[Point]:
    """Every point, axis by axis and size by size; a method without a rank has none on axis r.

    shape, r: what the axes that do not grow are.  layers: how many each process has on the axis
    ranks.  The stacks of the last two axes are of square linears, K x K.
    """
    names, (M, K, N) = list(names), shape
    registry = methods()
    for name in names:
        if name not in registry:
            raise ValueError(f"method must be one of {', '.join(registry)}, got {name!r}")
    for axis in axes:
        for size in sizes[axis]:
            for name in names:
                point = Point(name, axis, size, shape, r, 1, 1, dtype)
                if axis == "r":
                    if any(field.name == "r" for field in fields(registry[name])):
                        yield replace(point, r=size)
                elif axis == "layers":
                    yield replace(point, shape=(M, K, K), layers=size)
                elif axis == "ranks":
                    yield replace(point, shape=(M, K, K), layers=layers, ranks=size)
                else:
                    grown = {"M": (size, K, N), "K": (M, size, N), "N": (M, K, size)}[axis]
                    yield replace(point, shape=grown)


def check(point: Point) -> None:
    """ValueError where the method does not fit the sizes; nothing is allocated."""
    _, K, N = point.shape
    linear = nn.Linear(K, N, bias=False, device="meta", dtype=DTYPES[point.dtype])
    try:
        DecomposedLinear(linear, point.make())
    except ValueError as error:
        raise ValueError(f"{point.label}: {error}") from None


def least_bytes(point: Point) -> int:
    """What all processes' contenders hold at the least: three stacks of weights, x and dy."""
    M, K, N = point.shape
    held = 3 * point.layers * N * K + M * (K + N)
    return DTYPES[point.dtype].itemsize * held * (point.ranks if point.axis == "ranks" else 1)


@dataclass(frozen=True)
class Stack:
    """A contender as a model, before it becomes a step; path: what it is made of."""

    name: str
    module: nn.Module
    path: str = ""


def run(
    point: Point,
    *,
    rounds: int,
    warmup: int,
    seed: int,
    device: torch.device,
    clock: engine.Clock | None = None,
    peer: bool = True,
) -> dict[str, Any]:
    """Measure a point of one process, as the results file has it.

    clock: the device's wall clock where it is None.
    """
    started = time.monotonic()
    stacks, x, dy = build(point, seed=seed, device=device, peer=peer)
    contenders = [engine.layer(stack.name, stack.module, x, dy) for stack in stacks]
    paths = [path_of(stack, each) for stack, each in zip(stacks, contenders, strict=True)]
    clock = engine.device_clock(device) if clock is None else clock
    samples = engine.measure(contenders, rounds, warmup=warmup, seed=seed, clock=clock)
    measured = {}
    for stack, contender, path in zip(stacks, contenders, paths, strict=True):
        measured[stack.name] = {
            "path": path,
            "ratio": samples.by_phase(stack.name),
            "ns": samples.ns[stack.name],
            **sizes_of(stack, contender, device),
        }
    return row_of(point, stacks, measured, started)


def row_of(
    point: Point, stacks: list[Stack], measured: dict[str, Any], started: float
) -> dict[str, Any]:
    """The row of a results file; work: FLOPs and bytes of a step, counted and not measured."""
    return point.described | {
        "work": work(point, stacks),
        "contenders": measured,
        "seconds": round(time.monotonic() - started, 2),
    }


def sizes_of(stack: Stack, contender: engine.Contender, device: torch.device) -> dict[str, int]:
    """Bytes at the peak of a step and kept for its backward, and how many elements are trained."""
    kept = [*stack.module.parameters(), *stack.module.buffers()]
    return {
        "peak_bytes": memory.peak_bytes(contender, device),
        "saved_bytes": memory.saved_bytes(contender, kept),
        "trainable": sum(p.numel() for p in stack.module.parameters() if p.requires_grad),
    }


def build(
    point: Point, *, seed: int, device: torch.device, peer: bool = True, data_seed: int = 0
) -> tuple[list[Stack], Tensor, Tensor]:
    """The contenders of a point, each on its own copy of the same random weights; x and dy.

    Trained tensors are away from their start, so that no operand is zero.  data_seed: another one
    on each process gives each its own x and dy on the same weights.
    """
    M, K, N = point.shape
    dtype = DTYPES[point.dtype]
    torch.manual_seed(seed)
    weights = [torch.randn(N, K, device=device).div_(K**0.5).to(dtype) for _ in range(point.layers)]

    def linears() -> list[nn.Linear]:
        made = []
        for weight in weights:
            linear = nn.Linear(K, N, bias=False, device="meta", dtype=dtype)
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            made.append(linear)
        return made

    method = point.make()
    ours = [DecomposedLinear(linear, method, dtype=dtype) for linear in linears()]
    made = [
        Stack(FROZEN, _stack(linears()), "nn.Linear"),
        Stack(CONTROL, _stack(linears()), "nn.Linear"),
        Stack(OURS, _stack(ours)),
    ]
    leave_the_start(made[-1].module)
    if peer and peers.why_not(method) is None:
        layers = [peers.peft_layer(method, linear, dtype) for linear in linears()]
        made.append(Stack(PEFT, _stack(layers), peers.described(layers[0])))
        leave_the_start(made[-1].module)
    elif peer and formulas.why_not(method) is None:
        adapters = [layer.adapters["default"] for layer in ours]
        pairs = zip(linears(), adapters, strict=True)
        written = [formulas.of_adapter(linear, adapter, dtype) for linear, adapter in pairs]
        made.append(Stack(FORMULA, _stack(written), "written out"))
    torch.manual_seed(seed + 1 + data_seed)
    x, dy = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    return made, x, dy


def _stack(modules: Sequence[nn.Module]) -> nn.Module:
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def path_of(stack: Stack, contender: engine.Contender) -> str:
    """What a step of it was seen to call of our implementations, and how often: it is run for that.

    Of a contender that is not ours, what it is made of, and any call of ours that it should not
    have.
    """
    seen = observe(contender)
    if not stack.path:
        forwards = sum(
            n for (op, way, _), n in seen.calls.items() if (op, way) == (OPERATOR, "forward")
        )
        return f"{seen.path()} x {forwards}" if forwards else "no call of the operator"
    return f"{stack.path}, ours: {'; '.join(seen.lines())}" if seen.calls else stack.path


def work(point: Point, stacks: Iterable[Stack]) -> dict[str, dict[str, float]]:
    """FLOPs and bytes of a step, of the frozen stack and of ours, as the roofline counts them."""
    M, K, N = point.shape
    element = DTYPES[point.dtype].itemsize
    counted = {
        FROZEN: {
            "flops": 4.0 * M * N * K * point.layers,
            "bytes": 2.0 * element * (M * K + N * K + M * N) * point.layers,
        }
    }
    for stack in stacks:
        if stack.name == OURS:
            layer = next(m for m in stack.module.modules() if isinstance(m, DecomposedLinear))
            explained = explain(layer, M)
            ways = [way for way in (explained.forward, explained.backward) if way is not None]
            counted[OURS] = {
                "flops": point.layers * sum(way.flops for way in ways),
                "bytes": point.layers * sum(way.bytes for way in ways),
            }
    return counted
