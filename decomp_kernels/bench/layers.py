"""The layer suite: every method of the registry on one nn.Linear, next to the same by others.

A row is one method with its options at one shape and dtype.  Its contenders, in one interleaved
run: the frozen nn.Linear, an identical second one (the control), ours by every implementation, and
PEFT's layer or the written-out formula (contenders.py).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from decomp_kernels import roofline
from decomp_kernels.bench import conditions, engine, memory
from decomp_kernels.bench.contenders import OURS, Contenders, Entry
from decomp_kernels.bench.engine import FROZEN, PHASES, Samples
from decomp_kernels.explanation import Explanation, explain
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods import methods
from decomp_kernels.methods.base import Method
from decomp_kernels.roofline import Terms

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
    ("dropout 0.05 on the branch", "dora", {"dropout": 0.05, "dropout_mode": "branch"}, False),
    ("fp32 adapters", "dora", {}, True),
    ("fp32 adapters, dropout 0.05", "dora", {"dropout": 0.05, "dropout_mode": "peft"}, True),
    ("blocks of 32", "oft", {"r": None, "block_size": 32}, False),  # the default, PEFT's too
)
AS_BASE, WIDE = ADAPTER_DTYPES = ("base", "float32")


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

    @property
    def described(self) -> dict[str, Any]:
        """As a results file has it."""
        return asdict(self) | {"label": self.label, "options": dict(self.options)}

    def make(self) -> Method:
        return methods()[self.method](**dict(self.options))


def rows(
    names: list[str] | None,
    shapes: list[tuple[int, int, int]],
    dtypes: list[str],
    rank: int,
    biases: Sequence[bool] = (False,),
    dropouts: Sequence[float] | None = None,
    adapter_dtypes: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Every row asked for, the plain row of each method first; names None: the whole registry.

    dropouts, adapter_dtypes (of ADAPTER_DTYPES): every method with each of these, those without
    dropout once; where both are None, the plain rows and VARIANTS.
    """
    registry = methods()
    for name in names or []:
        if name not in registry:
            raise ValueError(f"method must be one of {', '.join(registry)}, got {name!r}")
    for p in dropouts or ():
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {p}")
    for shape in dict.fromkeys(shapes):
        for bias in dict.fromkeys(biases):
            for dtype in dict.fromkeys(dtypes):
                for name in dict.fromkeys(names or registry):
                    plain = _options(registry[name], rank)
                    if dropouts is None and adapter_dtypes is None:
                        asked = _variants(name)
                    else:
                        asked = _grid(name, dropouts or (0.0,), adapter_dtypes or (AS_BASE,))
                    for variant, extra, wide in asked:
                        if wide and dtype == "float32":
                            continue
                        label = ", ".join(filter(None, (variant, "bias" if bias else "")))
                        adapter_dtype = "float32" if wide else dtype
                        options = _sorted(plain | extra)
                        yield Row(name, options, shape, dtype, adapter_dtype, label, bias)


def check(row: Row) -> None:
    """ValueError where the method does not fit the layer; nothing is allocated."""
    _, K, N = row.shape
    linear = nn.Linear(K, N, bias=row.bias, device="meta", dtype=DTYPES[row.dtype])
    try:
        DecomposedLinear(linear, row.make(), dtype=DTYPES[row.adapter_dtype])
    except ValueError as error:
        raise ValueError(f"{row.label} on {K} x {N}: {error}") from None


def least_bytes(row: Row) -> int:
    """What a row's contenders hold at the least: four weights, inputs, outputs, gradients."""
    M, K, N = row.shape
    return DTYPES[row.dtype].itemsize * (4 * N * K + 2 * M * (K + N))


def _variants(name: str) -> Iterator[tuple[str, dict[str, Any], bool]]:
    yield "", {}, False
    for variant, of, extra, wide in VARIANTS:
        if of == name:
            yield variant, extra, wide


def _grid(
    name: str, dropouts: Sequence[float], adapter_dtypes: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    known = {field.name for field in fields(methods()[name])}
    for p in dict.fromkeys(dropouts) if "dropout" in known else (0.0,):
        for adapter_dtype in dict.fromkeys(adapter_dtypes):
            wide = adapter_dtype == WIDE
            parts = ["fp32 adapters"] * wide + [f"dropout {p:g}"] * (p > 0)
            extra: dict[str, Any] = {"dropout": p} if p else {}
            if p and "dropout_mode" in known:
                extra["dropout_mode"] = "peft"  # what PEFT computes
            yield ", ".join(parts), extra, wide


def run(
    row: Row,
    *,
    rounds: int,
    warmup: int,
    seed: int,
    device: torch.device,
    clock: engine.Clock | None = None,
    impls: Sequence[str] = (),
    others: bool = True,
    compile_too: bool = False,
    cold: bool = False,
) -> dict[str, Any]:
    """Measure one row: ratios, times, peak memory, bytes saved and work, as the results file has
    them.

    clock: the device's wall clock where it is None.  cold: cold caches too, which a GPU's rows have
    anyway.  The rest as Contenders has it.
    """
    started = time.monotonic()
    made = build(row, seed=seed, device=device, impls=impls, others=others, compile_too=compile_too)
    contenders = [entry.contender for entry in made.entries]
    samples, not_replayed = conditions.measure(
        contenders, rounds, device=device, clock=clock, warmup=warmup, seed=seed, cold=cold
    )
    measured = {entry.contender.name: _measured(entry, samples, device) for entry in made.entries}
    for name, why in not_replayed.items():
        measured[name]["not_replayed"] = why
    explained = explain(made.ours, row.shape[0])
    return row.described | {
        "contenders": measured,
        "left_out": made.left_out,
        "expected_path": expected_path(explained),
        "work": _work(row, explained),
        "roof": _roof(row, explained, samples),
        "seconds": round(time.monotonic() - started, 2),
    }


def build(
    row: Row,
    *,
    seed: int,
    device: torch.device,
    impls: Sequence[str] = (),
    others: bool = True,
    compile_too: bool = False,
) -> Contenders:
    """The contenders of a row."""
    return Contenders(
        row.make(), row.shape, DTYPES[row.dtype], DTYPES[row.adapter_dtype], row.bias,
        seed=seed, device=device, impls=impls, others=others, compile_too=compile_too,
    )  # fmt: skip


def _measured(entry: Entry, samples: Samples, device: torch.device) -> dict[str, Any]:
    contender, module = entry.contender, entry.module
    path = entry.path
    if entry.compiled is not None and entry.compiled.graphs != entry.compiled.prepared:
        path = entry.compiled.path()  # compiled anew while it was timed
    return {
        "path": path,
        "calls": list(entry.calls),
        "ratio": samples.by_phase(contender.name),
        "ns": samples.ns[contender.name],
        "peak_bytes": memory.peak_bytes(contender, device),
        "saved_bytes": memory.saved_bytes(contender, [*module.parameters(), *module.buffers()]),
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }


def expected_path(explained: Explanation) -> str:
    """What ``explain`` says that auto takes: both names where forward and backward differ."""
    forward, backward = explained.forward, explained.backward
    if backward is None or backward.impl == forward.impl:
        return forward.impl
    return f"{forward.impl}, {backward.impl}"


def _frozen_terms(row: Row) -> Terms:
    M, K, N = row.shape
    return Terms(M, N, K, element=DTYPES[row.dtype].itemsize)


def _work(row: Row, explained: Explanation) -> dict[str, dict[str, dict[str, float]]]:
    """FLOPs and bytes of ours and of the frozen layer by phase, as roofline.py counts them."""
    assert explained.backward is not None
    terms = _frozen_terms(row)
    parts = {
        OURS: [(d.flops, d.bytes) for d in (explained.forward, explained.backward)],
        FROZEN: [
            roofline.total(listed(terms, "aten"))
            for listed in (roofline.forward, roofline.backward)
        ],
    }
    return {
        name: {
            what: dict(zip(PHASES, (there[i], back[i], there[i] + back[i]), strict=True))
            for i, what in enumerate(("flops", "bytes"))
        }
        for name, (there, back) in parts.items()
    }


def _roof(row: Row, explained: Explanation, samples: Samples) -> dict[str, Any]:
    """The share of the roof that ours reaches, by phase: median and quartiles over the rounds.

    On a GPU with known ceilings the roof is all arithmetic at once, reading and writing each tensor
    once.  Elsewhere it is this machine's own matrix product: the FLOP/s of the frozen layer in the
    same round.
    """
    assert explained.backward is not None
    parts = explained.forward, explained.backward
    shares = {}
    if all(part.seconds is not None for part in parts):
        what = f"all arithmetic at once, each tensor once: {explained.ceilings}"
        least = [part.seconds * part.share_of_roof for part in parts]  # type: ignore[operator]
        for phase, seconds in zip(PHASES, (*least, sum(least)), strict=True):
            shares[phase] = engine.spread([seconds * 1e9 / ns for ns in samples.ns[OURS][phase]])
    else:
        what = "the FLOP/s of the frozen layer in the same round"
        work = _work(row, explained)
        for phase in PHASES:
            more = work[OURS]["flops"][phase] / work[FROZEN]["flops"][phase]
            shares[phase] = engine.spread([more / ratio for ratio in samples.ratios(OURS, phase)])
    return {"what": what, "share": {phase: share._asdict() for phase, share in shares.items()}}


def _options(cls: type[Method], rank: int) -> dict[str, Any]:
    """The options of the plain row: r, alpha = 2 r and the like, where the method has them."""
    known = {field.name for field in fields(cls)}
    chosen: dict[str, Any] = {"r": rank} | OWN_SIZE.get(cls.name, {})
    chosen["alpha"] = 2.0 * chosen["r"]
    chosen["target_r"] = chosen["r"] // 2 or 1
    return {name: value for name, value in chosen.items() if name in known}


def _sorted(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))
