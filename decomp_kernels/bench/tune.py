"""``decomp-kernels tune``: which implementation is fastest where, measured on this machine.

A cell is one call of the operator: tokens, shape, rank, dtypes, dropout.  Its implementations run
interleaved, forward and backward apart, and the table of implementations gets an entry that names
the fastest of each.  Library calls stay where nothing else is faster by more than MARGIN and by
more than the quartiles spread: the table never trades a sure thing for noise.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from decomp_kernels import dispatch, tables
from decomp_kernels.bench import engine, record
from decomp_kernels.bench.engine import FROZEN, Contender
from decomp_kernels.ops.decomposed_linear import decomposed_linear

LIBRARY = "aten"
MARGIN = 0.01  # what another implementation must gain
LAYERS = (  # N, K of Llama-class models of 8 and 70 billion parameters
    (4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (8192, 8192), (28672, 8192),
)  # fmt: skip
TOKENS = (1, 16, 512, 2048, 8192)
RANKS = (0, 16, 64, 384)
CPU_LAYERS = ((128, 128), (384, 384), (768, 768), (1024, 1024), (2048, 2048), (4096, 4096))
CPU_TOKENS = (16, 128, 512, 2048)
CPU_RANKS = (0, 16, 64)
CPU_MOST = 2**33  # a second or so a step
CPU_DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Cell:
    """One measurement.  r = 0: no branch, scales on both sides (SSB)."""

    M: int
    N: int
    K: int
    r: int
    dropout: float = 0.0
    wide_adapter: bool = False  # float32 down and up on a 16-bit base
    dtype: str = "bfloat16"
    scaled: bool = False  # DoRA: out_scale beside the branch

    @property
    def label(self) -> str:
        extra = f", dropout {self.dropout}" if self.dropout else ""
        wide = ", float32 adapter" if self.wide_adapter else ""
        wide += ", scaled" if self.scaled else ""
        kind = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"{self.M} x {self.K} x {self.N}{kind}, r={self.r}{extra}{wide}"

    def tensors(self, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """Random operands, none of them zero; x, down, up and scales require grad."""
        gen = torch.Generator(device).manual_seed(seed)
        base = getattr(torch, self.dtype)
        adapter = torch.float32 if self.wide_adapter else base

        def draw(*size: int, dtype: torch.dtype = base, by: float = 1.0) -> Tensor:
            return torch.randn(size, generator=gen, device=device).mul_(by).to(dtype)

        made = {
            "x": draw(self.M, self.K),
            "weight": draw(self.N, self.K, by=self.K**-0.5),
        }
        if self.r:
            made["down"] = draw(self.r, self.K, dtype=adapter, by=self.K**-0.5)
            made["up"] = draw(self.N, self.r, dtype=adapter, by=0.1)
        else:
            made["in_scale"] = 1.0 + draw(self.K, dtype=torch.float32, by=0.1)
        if self.scaled or not self.r:
            made["out_scale"] = 1.0 + draw(self.N, dtype=torch.float32, by=0.1)
        return {name: t.requires_grad_(name != "weight") for name, t in made.items()}


def cells(
    tokens: Iterable[int] = TOKENS,
    layers: Iterable[tuple[int, int]] = LAYERS,
    ranks: Iterable[int] = RANKS,
    dtypes: Iterable[str] = ("bfloat16",),
    scaled: Iterable[bool] = (False,),
    most: float = float("inf"),
) -> Iterator[Cell]:
    """Every cell of the grid, float32 adapters and dropout where there is a branch.

    most: multiplications of the base product, above which a cell is left out.
    """
    for dtype, M, (N, K), r in product(dtypes, tokens, layers, ranks):
        if most < M * N * K:
            continue
        if not r:
            yield Cell(M, N, K, r, dtype=dtype)
            continue
        for wide, dropout, by_scale in product((False, True), (0.0, 0.05), scaled):
            if not (wide and dtype == "float32"):
                yield Cell(M, N, K, r, dropout, wide, dtype, by_scale)


def measure(
    cell: Cell, device: torch.device, *, rounds: int, impls: Sequence[str] = dispatch.CANDIDATES
) -> dict[str, Any]:
    """Ratios to the frozen linear of each implementation, by direction, as the results have them.

    An implementation that raises is left out, with its error in ``failed``.
    """
    started = time.monotonic()
    contenders, failed = [_frozen(cell, device)], {}
    x = torch.empty(0, dtype=getattr(torch, cell.dtype), device=device)
    for impl in impls:
        if why := dispatch.why_not(x, impl):
            failed[impl] = why
            continue
        contender = _contender(cell, device, impl)
        try:
            contender.reset()
            contender.backward(contender.forward())
            contenders.append(contender)
        except Exception as error:  # a kernel that does not compile or does not fit
            failed[impl] = f"{type(error).__name__}: {str(error)[:300]}"
    samples = engine.measure(
        contenders, rounds, warmup=3, clock=engine.device_clock(device), split=True
    )
    ratios = {contender.name: samples.by_phase(contender.name) for contender in contenders[1:]}
    frozen = {phase: samples.time(FROZEN, phase).median / 1e6 for phase in engine.PHASES}
    return asdict(cell) | {
        "label": cell.label, "ratio": ratios, "frozen_ms": frozen, "failed": failed,
        "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip


def fastest(row: dict[str, Any], direction: str) -> str:
    """The implementation of a measured cell: library calls unless another is surely faster."""
    ratios = {impl: phases[direction] for impl, phases in row["ratio"].items()}
    if LIBRARY not in ratios:
        raise RuntimeError(f"library calls failed at {row['label']}: {row['failed'][LIBRARY]}")
    best = min(ratios, key=lambda impl: ratios[impl]["median"])
    library = ratios[LIBRARY]
    surely = ratios[best]["median"] < library["median"] * (1.0 - MARGIN)
    apart = ratios[best]["q3"] < library["q1"]
    return best if surely and apart else LIBRARY


def entries(
    rows: Sequence[dict[str, Any]],
    arch: str,
    measured: dict[str, Any] | None,
    *,
    one_call: bool = False,
) -> list[dict[str, Any]]:
    """Table entries of measured cells, smallest first, so that the first that fits is nearest.

    Cells that the table cannot tell apart (N and K swapped) take what none of them loses by.
    one_call: csrc/autograd takes dropout and float32 adapters by host kernels both ways or not at
    all, so that these are chosen by the whole step.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds = (row["wide_adapter"], row["dropout"] > 0, row["dtype"] == "float32", row["scaled"])
        groups.setdefault((row["M"], row["N"] * row["K"], row["r"], *kinds), []).append(row)
    scales = any(row["scaled"] for row in rows)  # else what holds without stands for both
    made = []
    for (M, NK, r, wide, dropout, float32, scaled), group in sorted(groups.items()):
        entry: dict[str, Any] = {
            "arch": arch, "operator": "decomposed_linear",
            "when": {"M_max": M, "NK_max": NK, "r_max": r},
            "base": tables.width(float32),
            "adapter": tables.width(float32 or wide),
            "dropout": dropout,
        } | ({"scaled": scaled or r == 0} if scales else {})  # fmt: skip
        relative = {}
        for direction in DIRECTIONS:
            by = "both" if one_call and (wide or dropout) else direction
            chosen = {fastest(row, by) for row in group}
            entry[direction] = chosen.pop() if len(chosen) == 1 else LIBRARY
            relative[direction] = {
                impl: round(
                    max(
                        row["ratio"][impl][direction]["median"]
                        / row["ratio"][entry[direction]][direction]["median"]
                        for row in group
                    ),
                    4,
                )
                for impl in group[0]["ratio"]
                if all(impl in row["ratio"] for row in group)
            }
        entry["measured"] = measured | {"relative": relative} if measured else False
        made.append(entry)
    return made


def fewer(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the entries that another one, which would be taken in their place, repeats."""
    kinds = ("arch", "operator", "base", "adapter", "dropout", "scaled")

    def repeated(entry: dict[str, Any], later: list[dict[str, Any]]) -> bool:
        for other in later:
            alike = all(entry.get(kind) == other.get(kind) for kind in kinds)
            limits = entry["when"].items()
            if alike and all(most <= other["when"].get(limit, most) for limit, most in limits):
                return all(entry[direction] == other[direction] for direction in DIRECTIONS)
        return False

    kept: list[dict[str, Any]] = []
    for index in reversed(range(len(made))):
        if not repeated(made[index], kept):
            kept.insert(0, made[index])
    return kept


def provenance(device: torch.device) -> dict[str, str]:
    """Where and when: what a table entry says of its measurement."""
    versions, machine = record.versions(), record.machine()
    name = dispatch.device_name(device)
    if device.type == "cpu":
        name = f"{machine['cpu']}, {machine['threads']} threads"
    return {
        "on": name,
        "torch": versions["torch"],
        "triton": versions.get("triton", "none"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _contender(cell: Cell, device: torch.device, impl: str) -> Contender:
    tensors = cell.tensors(device)
    dy = torch.randn(cell.M, cell.N, device=device).to(tensors["x"].dtype)
    seed = torch.tensor(7, dtype=torch.int64, device=device) if cell.dropout else None

    def reset() -> None:
        for tensor in tensors.values():
            tensor.grad = None

    def forward() -> Tensor:
        return decomposed_linear(**tensors, dropout=cell.dropout, seed=seed, impl=impl)  # type: ignore[arg-type]

    return Contender(impl, forward, lambda y: y.backward(dy), reset, impl)


def _frozen(cell: Cell, device: torch.device) -> Contender:
    tensors = cell.tensors(device)
    x, weight = tensors["x"], tensors["weight"]
    dy = torch.randn(cell.M, cell.N, device=device).to(x.dtype)

    def reset() -> None:
        x.grad = None

    return Contender(FROZEN, lambda: F.linear(x, weight), lambda y: y.backward(dy), reset)
