"""The layer suite: every method of the registry on one nn.Linear, next to the same in PEFT.

A row is one method with its options at one shape and dtype.  Its contenders, in one interleaved
run: the frozen nn.Linear, an identical second one (the control), ours, and the peer where one
exists.  Each has its own copy of the same random weight, and trainable tensors away from their
start, so that no operand is zero.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from decomp_kernels.bench import conditions, engine, memory, peers
from decomp_kernels.bench.engine import CONTROL, FROZEN, Contender
from decomp_kernels.explanation import Explanation, explain
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods import methods
from decomp_kernels.methods.base import Method

OURS, PEER = "ours", "peer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Sizes of the methods whose rank is not LoRA's: the common choice of their papers or of PEFT.
OWN_SIZE: dict[str, dict[str, Any]] = {"hra": {"r": 8}}

# Variants beside a method's plain row: label, method, options, float32 adapters on a narrow base.
VARIANTS: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("dropout 0.05", "lora", {"dropout": 0.05}, False),
    ("fp32 adapters", "lora", {}, True),
    ("fp32 adapters, dropout 0.05", "lora", {"dropout": 0.05}, True),
    ("cached norm", "dora", {"cache_norm": True}, False),
    ("dropout 0.05", "dora", {"dropout": 0.05, "dropout_mode": "peft"}, False),
    ("fp32 adapters", "dora", {}, True),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.  M tokens, K in, N out; dtypes by name."""

    method: str
    options: tuple[tuple[str, Any], ...]
    shape: tuple[int, int, int]
    dtype: str
    adapter_dtype: str
    variant: str = ""
    bias: bool = False

    @property
    def label(self) -> str:
        return f"{self.method}, {self.variant}" if self.variant else self.method

    def make(self) -> Method:
        return methods()[self.method](**dict(self.options))


def rows(
    names: list[str] | None,
    shapes: list[tuple[int, int, int]],
    dtypes: list[str],
    rank: int,
    bias: bool = False,
) -> Iterator[Row]:
    """Every row asked for, the plain row of each method first; names None: the whole registry."""
    registry = methods()
    for name in names or []:
        if name not in registry:
            raise ValueError(f"method must be one of {', '.join(registry)}, got {name!r}")
    for shape in shapes:
        for dtype in dtypes:
            for name in names or registry:
                plain = _options(registry[name], rank)
                yield Row(name, _sorted(plain), shape, dtype, dtype, bias=bias)
                for variant, of, extra, wide in VARIANTS:
                    if of != name or (wide and dtype == "float32"):
                        continue
                    adapter_dtype = "float32" if wide else dtype
                    options = _sorted(plain | extra)
                    yield Row(name, options, shape, dtype, adapter_dtype, variant, bias)


def run(
    row: Row,
    *,
    rounds: int,
    warmup: int,
    seed: int,
    device: torch.device,
    clock: engine.Clock | None = None,
    peer: bool = True,
    impls: Sequence[str] = (),
    cold: bool = False,
) -> dict[str, Any]:
    """Measure one row: ratios, times, peak memory and bytes saved, as the results file has them.

    clock: the device's wall clock where it is None.  impls: implementations beside what auto takes.
    cold: cold caches too, which a GPU's rows have anyway.
    """
    started = time.monotonic()
    contenders, modules = build(row, seed=seed, device=device, peer=peer, impls=impls)
    samples, not_replayed = conditions.measure(
        contenders, rounds, device=device, clock=clock, warmup=warmup, seed=seed, cold=cold
    )
    measured = {}
    for contender, module in zip(contenders, modules, strict=True):
        kept = [*module.parameters(), *module.buffers()]
        measured[contender.name] = {
            "path": contender.path,
            "ratio": {
                phase: samples.ratio(contender.name, phase)._asdict()
                for phase in sorted(samples.ns[contender.name])
            },
            "ns": samples.ns[contender.name],
            "peak_bytes": memory.peak_bytes(contender, device),
            "saved_bytes": memory.saved_bytes(contender, kept),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
    described = asdict(row) | {"label": row.label, "options": dict(row.options)}
    for name, why in not_replayed.items():
        measured[name]["not_replayed"] = why
    return described | {
        "contenders": measured,
        "seconds": round(time.monotonic() - started, 2),
    }


def build(
    row: Row,
    *,
    seed: int,
    device: torch.device,
    peer: bool = True,
    impls: Sequence[str] = (),
) -> tuple[list[Contender], list[nn.Module]]:
    """The contenders of a row and their modules."""
    M, K, N = row.shape
    dtype, adapter_dtype = DTYPES[row.dtype], DTYPES[row.adapter_dtype]
    torch.manual_seed(seed)
    x, dy = (torch.randn(M, size, device=device).to(dtype) for size in (K, N))
    weight = torch.randn(N, K, device=device).div_(K**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype) if row.bias else None

    def linear() -> nn.Linear:
        made = nn.Linear(K, N, bias=row.bias, device="meta", dtype=dtype)
        made.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return made

    method = row.make()
    layer = DecomposedLinear(linear(), method, dtype=adapter_dtype)
    made: list[tuple[str, nn.Module, str]] = [
        (FROZEN, linear(), "nn.Linear"),
        (CONTROL, linear(), "nn.Linear"),
        (OURS, layer, _path(explain(layer, M))),
    ]
    for impl in impls:
        named = replace(method, impl=impl)
        made.append((impl, DecomposedLinear(linear(), named, dtype=adapter_dtype), impl))
    other = peers.peer(method, linear(), adapter_dtype) if peer else None
    if other is not None:
        made.append((PEER, *other))
    for _, module, _ in made:
        _leave_the_start(module)
    contenders = [engine.layer(name, module, x, dy, path) for name, module, path in made]
    return contenders, [module for _, module, _ in made]


def _path(explained: Explanation) -> str:
    """What auto takes: both names where forward and backward differ."""
    forward, backward = explained.forward, explained.backward
    if backward is None or backward.impl == forward.impl:
        return forward.impl
    return f"{forward.impl}, {backward.impl}"


@torch.no_grad()
def _leave_the_start(module: nn.Module) -> None:
    """Add noise to what is trained: LoRA's B is zero at the start, and zeros are fast."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _options(cls: type[Method], rank: int) -> dict[str, Any]:
    """The options of the plain row: r, alpha = 2 r and the like, where the method has them."""
    known = {field.name for field in fields(cls)}
    chosen: dict[str, Any] = {"r": rank} | OWN_SIZE.get(cls.name, {})
    chosen["alpha"] = 2.0 * chosen["r"]
    chosen["target_r"] = chosen["r"] // 2 or 1
    return {name: value for name, value in chosen.items() if name in known}


def _sorted(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))
