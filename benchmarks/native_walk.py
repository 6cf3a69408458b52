"""Host kernels that walk a large matrix and the library calls of kernels/composition.py that they
stand in for: cases of native_kernels.py.

Both sides compute the same results from the same tensors, small ones included.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from decomp_kernels import native_library
from decomp_kernels.kernels import composition, gemm
from decomp_kernels.reference.decomposed_linear import Gradients
from decomp_kernels.reference.dropout import kept_fraction

SHAPES = [(512, 1024, 1024), (512, 2048, 2048)]
RANKS = [16, 64]
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 adapters": (torch.bfloat16, torch.float32),
}
DROPOUT, SCALE = 0.05, 2.0
ALL = Gradients(*[True] * 9)
Pair = tuple[Callable[[], object], Callable[[], object]]
Case = tuple[str, str, Callable[[], object], Callable[[], object]]


class Layer(NamedTuple):
    """Operands of one layer's forward and backward."""

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    z: Tensor  # [M, N]
    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    t: Tensor  # [M, r], also dt
    bias: Tensor  # [N]
    out_scale: Tensor  # [N]
    seed: Tensor


def layer(M: int, K: int, N: int, r: int, wide: torch.dtype, small: torch.dtype) -> Layer:
    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return Layer(
        of(wide, M, K), of(wide, M, N), of(wide, M, N), of(small, r, K), of(small, N, r),
        of(small, M, r), of(wide, N), of(torch.float32, N), torch.tensor(7),
    )  # fmt: skip


def project(a: Layer, p: float) -> Pair:
    ops, seed = native_library.ops(), a.seed if p else None

    def aten() -> object:
        t = composition.project_dropped(a.x, a.down, seed, p)
        return t, composition.times(t, None, SCALE)

    return aten, lambda: ops.down_projection(a.x, a.down, None, seed, SCALE, p, "identity")


def expand(a: Layer, p: float) -> Pair:
    """The branch's part of d_X."""
    ops, seed, dtype = native_library.ops(), a.seed if p else None, a.x.dtype

    def native() -> object:
        dt = a.t * (1.0 / kept_fraction(p)) if p else a.t
        return ops.up_expansion(dt, a.down, None, None, seed, p, dtype)

    def aten() -> object:
        return composition.to_input(a.t, a.x, a.down, None, seed, p, dtype, True, False)

    return aten, native


def expand_forward(a: Layer) -> Pair:
    ops, dtype = native_library.ops(), a.x.dtype
    return (
        lambda: gemm.expand(a.t, a.up.T, a.bias, dtype),
        lambda: ops.up_expansion(a.t, a.up.T.contiguous(), a.bias, None, None, 0.0, dtype),
    )


def down_gradient(a: Layer, p: float) -> Pair:
    ops, seed = native_library.ops(), a.seed if p else None

    def native() -> object:
        dt = a.t * (1.0 / kept_fraction(p)) if p else a.t
        c = ops.column_walk(a.x, None, dt, None, None, seed, p, False, True)[1]
        return c.to(a.down.dtype)

    def aten() -> object:
        return composition.to_input(a.t, a.x, a.down, None, seed, p, a.x.dtype, False, True)

    return aten, native


def over_dy(a: Layer, bias: bool, dora: bool) -> Pair:
    """dt and d_up; d_bias; g and d_out_scale."""
    ops = native_library.ops()
    s_o = a.out_scale if dora else None

    def aten() -> object:
        scale = composition.over_scale(
            a.dy, a.z if dora else None, a.bias if bias else None, s_o, scaled=True, need=ALL
        )
        rest = composition.low_rank(
            a.dy, a.up, None, s_o, a.t, SCALE, "identity", (True, True, False)
        )
        return scale, rest

    def native() -> object:
        v = composition.times(a.t, None, SCALE)
        right = a.up if s_o is None else (a.up * s_o[:, None]).to(a.up.dtype)
        u, c, p, s, g = ops.column_walk(
            a.dy, right, v, a.z if dora else None, s_o, None, 0.0, bias, False
        )
        dt = (u * SCALE).to(a.up.dtype)
        d_up = (c if s_o is None else c.mul_(s_o[:, None])).to(a.up.dtype)
        return dt, d_up, p, s.to(a.bias.dtype), g

    return aten, native


CASES: dict[str, Callable[[Layer], Pair]] = {
    "down projection": lambda a: project(a, 0.0),
    "down projection, dropout": lambda a: project(a, DROPOUT),
    "up expansion, bias": expand_forward,
    "dy: LoRA": lambda a: over_dy(a, False, False),
    "dy: LoRA, bias": lambda a: over_dy(a, True, False),
    "dy: DoRA": lambda a: over_dy(a, False, True),
    "dA": lambda a: down_gradient(a, 0.0),
    "dA, dropout": lambda a: down_gradient(a, DROPOUT),
    "dX": lambda a: expand(a, 0.0),
    "dX, dropout": lambda a: expand(a, DROPOUT),
}


def cases() -> Iterator[Case]:
    for name, dtypes in DTYPES.items():
        for M, K, N in SHAPES:
            for r in RANKS:
                operands = layer(M, K, N, r, *dtypes)
                for case, build in CASES.items():
                    yield case, f"{M} x {K} r={r} {name}", *build(operands)
