"""How long a decomposed linear takes at the least: FLOPs, bytes and the ceilings of a GPU.

A step is one kernel or library call and takes max(FLOPs / rate, bytes / bandwidth).  Steps do not
overlap, launches cost nothing and every operand comes from device memory once a step: a lower bound
for each implementation, and no measurement.  Elementwise work is counted in bytes alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple


class Ceilings(NamedTuple):
    """What a GPU reaches, not what its data sheet says.  FLOP/s and byte/s."""

    name: str
    arch: str
    narrow: float  # bf16 and fp16 matrix products
    float32: float  # float32 products, which are never done as tf32
    bandwidth: float
    source: str

    def rate(self, wide: bool) -> float:
        return self.float32 if wide else self.narrow


_FLOAT32 = "float32 assumed at 85 % of nominal"
GPUS = {
    c.name: c
    for c in (
        Ceilings("H200", "sm_90", 790e12, 57e12, 4.30e12,
                 f"bf16 and bandwidth measured on one; {_FLOAT32}"),
        Ceilings("H100", "sm_90", 790e12, 57e12, 3.00e12,
                 f"bf16 as on the H200, the same chip; bandwidth assumed at 90 % of nominal; "
                 f"{_FLOAT32}"),
        Ceilings("A100", "sm_80", 265e12, 16.5e12, 1.67e12,
                 f"bf16 assumed at 85 % of nominal; bandwidth as published by dorafactors; "
                 f"{_FLOAT32}"),
        Ceilings("RTX 4090", "sm_89", 165e12, 70e12, 0.92e12,
                 f"bf16 as published with torch-cublas-hgemm; bandwidth assumed at 91 % of "
                 f"nominal; {_FLOAT32}"),
        Ceilings("B200", "sm_100", 1600e12, 64e12, 6.48e12,
                 f"bf16 assumed at 71 % of nominal; bandwidth as published by dorafactors; "
                 f"{_FLOAT32}"),
        Ceilings("MI300X", "gfx942", 650e12, 139e12, 4.20e12,
                 f"bf16 assumed at 50 % and bandwidth at 79 % of nominal; {_FLOAT32}"),
    )
}  # fmt: skip


class Step(NamedTuple):
    """One kernel or library call.  wide: its products are of float32 operands."""

    name: str
    flops: float
    bytes: float
    wide: bool = False

    def seconds(self, gpu: Ceilings) -> float:
        return max(self.flops / gpu.rate(self.wide), self.bytes / gpu.bandwidth)


def total(steps: list[Step]) -> tuple[float, float]:
    """(FLOPs, bytes) of all."""
    return sum(step.flops for step in steps), sum(step.bytes for step in steps)


def seconds(steps: list[Step], gpu: Ceilings) -> float:
    return sum(step.seconds(gpu) for step in steps)


@dataclass(frozen=True)
class Terms:
    """One call of the operator: sizes, element sizes in bytes, which terms, what is trained."""

    M: int
    N: int
    K: int
    r: int = 0  # 0: no branch
    element: int = 2  # of x, W and y
    adapter: int = 2  # of down and up
    in_scale: bool = False
    out_scale: bool = False
    addend: bool = False
    dropout: bool = False
    training: bool = True  # x needs its gradient, and what is trained does
    trained_factors: bool = True  # down or up
    trained_scales: bool = True
    trained_bias: bool = False
    trained_weight: bool = False
    weight_map: str | None = None
    map_size: int = 0  # its rank, its block times the number of factors, or its values

    @property
    def wide(self) -> bool:
        return self.element == 4

    @property
    def mixed(self) -> bool:
        return self.r > 0 and self.adapter > self.element

    @property
    def x(self) -> int:
        return self.element * self.M * self.K

    @property
    def y(self) -> int:
        return self.element * self.M * self.N

    @property
    def w(self) -> int:
        return self.element * self.N * self.K

    @property
    def gemm(self) -> int:
        return 2 * self.M * self.N * self.K


def forward(t: Terms, impl: str) -> list[Step]:
    """The steps of a forward by implementation."""
    return list(_forward(t, impl))


def backward(t: Terms, impl: str) -> list[Step]:
    """The steps of a backward; none where nothing is trained."""
    return list(_backward(t, impl)) if t.training else []


def roof(t: Terms, *, back: bool) -> Step:
    """All arithmetic of one direction in one step that reads and writes each tensor once."""
    flops, moved = t.gemm, t.x + t.y + t.w
    small = t.adapter * t.r * (t.N + t.K)
    map_flops, _ = _map_cost(t, back)
    if back:
        trained = t.r > 0 and t.trained_factors
        flops += t.gemm if t.trained_weight else 0
        moved += t.w if t.trained_weight else 0
        flops += 2 * t.M * t.r * (t.N + t.K) * (2 if trained else 1)
        reads_x = trained or (t.in_scale and t.trained_scales) or t.weight_map is not None
        moved += small * (2 if trained else 1) + (t.x if reads_x else 0)
        moved += t.y if t.out_scale and t.trained_scales else 0
    else:
        flops += 2 * t.M * t.r * (t.N + t.K)
        moved += small + (t.y if t.addend else 0)
        moved += t.y if t.out_scale and t.trained_scales and t.training else 0
    return Step("roof", flops + map_flops, moved, t.wide)


def _forward(t: Terms, impl: str) -> Iterator[Step]:
    M, N, K, r = t.M, t.N, t.K, t.r
    ours, fused = impl != "aten", impl.endswith(":fused")
    rank_rows, rank_cols = 4 * M * r, t.adapter * r * (N + K)
    wide = t.adapter == 4 and not ours  # ours split float32 adapters for matrix units
    if t.weight_map is not None:
        yield Step(f"{t.weight_map}: build W_eff", *_map_cost(t, back=False), t.wide)
    if r:
        read = t.x
        if impl == "aten":
            yield from _mask(t, "x")
            read += _converted(t, t.x)
        parts = 3 if ours and t.mixed else 1
        small = rank_rows + rank_cols // 2
        yield Step("t = drop(x) A^T", 2 * M * K * r * parts, read + small, t.wide or wide)
    if fused:
        moved = t.x + t.w + t.y + rank_rows + rank_cols // 2 + (t.y if t.addend else 0)
        moved += t.y if t.out_scale and t.trained_scales and t.training else 0  # z
        yield Step("y in one kernel", t.gemm + 2 * M * N * r, moved, t.wide)
        return
    starts = bool(r or t.addend)
    if r:
        moved = t.y + (t.y if t.addend else 0) + rank_rows + rank_cols // 2
        moved += 0 if ours else _converted(t, t.y)
        yield Step("v B^T", 2 * M * N * r, moved, t.wide or wide)
    elif t.addend:
        yield Step("copy of the addend", 0, 2 * t.y)
    if t.in_scale:
        yield Step("x * in_scale", 0, 2 * t.x)
    yield Step("base GEMM", t.gemm, t.x + t.w + t.y + (t.y if starts else 0), t.wide)
    if t.out_scale:
        yield Step("z * out_scale", 0, 2 * t.y)


def _backward(t: Terms, impl: str) -> Iterator[Step]:
    M, N, K, r = t.M, t.N, t.K, t.r
    ours, fused = impl != "aten", impl.endswith(":fused")
    rank_rows, rank_cols = 4 * M * r, t.adapter * r * (N + K)
    wide = t.adapter == 4 and not ours
    trained = r > 0 and t.trained_factors
    parts = 3 if ours and t.mixed else 1
    sums = t.trained_bias or (t.out_scale and t.trained_scales)
    needs_z = t.y if t.out_scale and t.trained_scales else 0
    if ours and (r or sums):
        flops = 2 * M * N * r * (2 if trained else 1) * parts
        partials = min(2 * 4 * M * r * -(-N // 128), t.y)  # u's, or another read of dy
        moved = t.y + needs_z + partials + rank_rows + rank_cols // 2
        yield Step("one pass over dy", flops, moved, t.wide)
    if t.out_scale and not fused:
        again = 0 if impl == "native:passes" else t.y  # native: of the one pass over dy
        yield Step("dy * out_scale", 0, t.y + again + (0 if ours else needs_z))
    elif t.trained_bias and not ours:
        yield Step("sum of dy", 0, t.y)
    if r and not ours:
        moved = t.y + _converted(t, t.y) + rank_rows + rank_cols // 2
        yield Step("u = dy B", 2 * M * N * r, moved, t.wide or wide)
        if trained:
            again = 4 * M * N if t.mixed else t.y
            yield Step("dB", 2 * M * N * r, again + rank_rows + rank_cols // 2, t.wide or wide)
    if trained:
        if not ours:
            yield from _mask(t, "x")
        moved = t.x + (0 if ours else _converted(t, t.x)) + rank_rows + rank_cols // 2
        yield Step("dA", 2 * M * K * r * parts, moved, t.wide or wide)
    if fused:
        moved = t.x + t.w + t.y + rank_rows + rank_cols // 2
        moved += t.x if t.in_scale and t.trained_scales else 0
        yield Step("dx in one kernel", t.gemm + 2 * M * K * r, moved, t.wide)
    else:
        if r:
            moved = t.x + rank_rows + rank_cols // 2 + (0 if ours else _converted(t, t.x))
            yield Step("dt A", 2 * M * K * r, moved, t.wide or wide)
            if not ours:
                yield from _mask(t, "dt A", kept=trained)
        moved = t.x + t.w + t.y + (t.x if r else 0)
        yield Step("base GEMM for dx", t.gemm, moved, t.wide)
        if t.in_scale:  # in Triton of the pass that dA is from, which reads x already
            reads_x = t.x if t.trained_scales and not (ours and trained) else 0
            yield Step("dx * in_scale", 0, 2 * t.x + reads_x)
    if t.trained_weight:
        yield Step("dW", t.gemm, t.x + t.y + t.w, t.wide)
    if t.weight_map is not None:
        yield Step(f"{t.weight_map}: its gradients", *_map_cost(t, back=True), t.wide)


def _mask(t: Terms, of: str, kept: bool = False) -> Iterator[Step]:
    """Dropout by library calls: 17 operations on 16-bit lanes in words, then one on the elements.

    kept: the mask is there from the product before.  A block of them stays in cache, so that a
    device is faster than this where launches are free.
    """
    if t.dropout:
        made = 0 if kept else 68 * t.M * t.K
        yield Step(f"mask of {of}", 0, made + 2 * t.M * t.K + 2 * t.x)


def _converted(t: Terms, size: int) -> int:
    """float32 adapters beside a narrow tensor: what its float32 blocks add, written and read."""
    return 2 * 2 * size if t.mixed else 0


def _map_cost(t: Terms, back: bool) -> tuple[float, float]:
    """FLOPs and bytes of a weight map; of its gradients where ``back`` (kernels/aten)."""
    if t.weight_map is None:
        return 0.0, 0.0
    NK, size = t.N * t.K, t.map_size
    build = {
        "hadamard": 2 * NK * size,
        "double_hadamard": 4 * NK * size,
        "block_rotate": 2 * NK * size,
        "singular_diagonal": 2 * NK * size,
        "scatter": 0,
    }[t.weight_map]
    if not back:
        return build, 2 * t.w
    # W_eff is built again for dx, then dW = g^T x block by block, contracted at once.
    contract = {
        "hadamard": t.gemm + 4 * NK * size,
        "double_hadamard": t.gemm + 12 * NK * size,
        "block_rotate": 2 * 2 * t.M * t.K * size,
        "singular_diagonal": min(2 * t.M * size * (t.N + t.K), t.gemm + 2 * NK * size),
        "scatter": 2 * t.M * size,
    }[t.weight_map]
    return build + contract, 2 * t.w + t.x + t.y + t.w


def without_branch(t: Terms) -> Terms:
    """The frozen linear of the same size."""
    return replace(
        t, r=0, in_scale=False, out_scale=False, addend=False, dropout=False,
        trained_bias=False, weight_map=None,
    )  # fmt: skip
