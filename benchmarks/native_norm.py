"""Host kernels on weights and the library calls they stand in for: cases of native_kernels.py.

Row norms, merged weights, Gram matrices of a model's factors, dequantisation, block-diagonal
rotations, and sparse values.
"""

from collections.abc import Callable, Iterator

import torch

from decomp_kernels.factors import BlockRotate, Scatter
from decomp_kernels.kernels.aten import block_rotate as aten_block_rotate
from decomp_kernels.kernels.aten import dequantize as aten_dequantize
from decomp_kernels.kernels.aten import gram as aten_gram
from decomp_kernels.kernels.aten import row_norm as aten_row_norm
from decomp_kernels.kernels.aten import scatter as aten_scatter
from decomp_kernels.kernels.native import (
    block_rotate,
    dequantize,
    gram,
    merged_weight,
    row_norm,
    scatter,
)
from decomp_kernels.reference import decomposed_linear as reference

SIZES = (1024, 2048, 4096)
RANKS = (16, 64)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}
LAYERS = 64

Case = tuple[str, str, Callable[[], object], Callable[[], object]]


def row_norms() -> Iterator[Case]:
    for size in SIZES:
        for dtype, (base, _) in DTYPES.items():
            weight = torch.randn(size, size).to(base)
            yield (
                "squared_rows", f"{size} {dtype}",
                lambda W=weight: aten_row_norm.squared_rows(W),
                lambda W=weight: row_norm.squared_rows(W),
            )  # fmt: skip
            for r in RANKS:
                yield from _row_norm(size, r, dtype)


def _row_norm(size: int, r: int, dtype: str) -> Iterator[Case]:
    base, adapter = DTYPES[dtype]
    weight = torch.randn(size, size).to(base)
    small = torch.randn(r, size).to(adapter), torch.randn(size, r).to(adapter)
    weight_sq = aten_row_norm.squared_rows(weight)
    norm = aten_row_norm.forward(weight, weight_sq, *small, 0.5)
    d_norm = torch.randn(size)
    yield (
        "row_norm forward", f"{size} r={r} {dtype}",
        lambda: aten_row_norm.forward(weight, weight_sq, *small, 0.5),
        lambda: row_norm.forward(weight, weight_sq, *small, 0.5),
    )  # fmt: skip
    yield (
        "row_norm backward", f"{size} r={r} {dtype}",
        lambda: aten_row_norm.backward(d_norm, norm, weight, *small, 0.5),
        lambda: row_norm.backward(d_norm, norm, weight, *small, 0.5),
    )  # fmt: skip


def merges() -> Iterator[Case]:
    for size in SIZES:
        for r in RANKS:
            for dtype, (base, adapter) in DTYPES.items():
                weight = torch.randn(size, size).to(base)
                down, up = torch.randn(r, size).to(adapter), torch.randn(size, r).to(adapter)
                for name, scales in (
                    ("LoRA", (None, None)),
                    ("DoRA", (None, torch.rand(size))),
                ):
                    terms = (weight, down, up, None, *scales, 0.5)
                    yield (
                        "merged_weight", f"{size} r={r} {dtype} {name}",
                        lambda terms=terms: reference.merged_weight(*terms),
                        lambda terms=terms: merged_weight.merged_weight(*terms),
                    )  # fmt: skip


def grams() -> Iterator[Case]:
    for r in RANKS:
        for dtype in (torch.float32, torch.bfloat16):
            one = torch.ones(())
            downs = [torch.randn(r, 1024).to(dtype) for _ in range(LAYERS)]
            ups = [torch.randn(1024, r).to(dtype) for _ in range(LAYERS)]
            shape = f"{LAYERS} x 1024 r={r} {'fp32' if dtype == torch.float32 else 'bf16'}"
            _, residuals = aten_gram.forward(downs, ups, "o", True, 1.0)
            yield (
                "gram forward", shape,
                lambda d=downs, u=ups: aten_gram.forward(d, u, "o", True, 1.0),
                lambda d=downs, u=ups: gram.forward(d, u, "o", True, 1.0),
            )  # fmt: skip
            yield (
                "gram backward", shape,
                lambda d=(one, downs, ups, residuals): aten_gram.backward(*d, True, 1.0),
                lambda d=(one, downs, ups, residuals): gram.backward(*d, True, 1.0),
            )  # fmt: skip


def codes() -> Iterator[Case]:
    for size in SIZES:
        nf4 = torch.randint(0, 256, (size * size // 2,), dtype=torch.uint8)
        int8 = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        for kind, weight, absmax in (
            ("nf4", nf4, torch.rand(size * size // 64)),
            ("int8", int8, torch.rand(size)),
        ):
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                terms = (weight, absmax, kind, size, size, dtype)
                yield (
                    "dequantize", f"{size} {kind} {name}",
                    lambda terms=terms: aten_dequantize.forward(*terms),
                    lambda terms=terms: dequantize.forward(*terms),
                )  # fmt: skip


def rotations() -> Iterator[Case]:
    """Of 512 tokens."""
    for size in SIZES[:2]:
        for b in (16, 32, 64):
            m = BlockRotate(torch.randn(1, size // b, b, b))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                x, gx = (torch.randn(512, size).to(dtype) for _ in range(2))
                yield (
                    "block_rotate forward", f"{size} b={b} {name}",
                    lambda m=m, x=x: aten_block_rotate.forward(m, x),
                    lambda m=m, x=x: block_rotate.forward(m, x),
                )  # fmt: skip
                yield (
                    "block_rotate backward", f"{size} b={b} {name}",
                    lambda m=m, x=x, gx=gx: aten_block_rotate.backward(m, gx, x),
                    lambda m=m, x=x, gx=gx: block_rotate.backward(m, gx, x),
                )  # fmt: skip


def sampled() -> Iterator[Case]:
    """Sparse values and their gradient, of 512 tokens; ranks: as many values as LoRA has."""
    for size in SIZES[:2]:
        for r in RANKS:
            places = torch.randperm(size * size)[: 2 * r * size].sort().values
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                g, x = (torch.randn(512, size).to(dtype) for _ in range(2))
                values = torch.empty(len(places), dtype=dtype)
                m = Scatter(places // size, places % size, values)
                dense = torch.randn(size, size).to(dtype)
                yield (
                    "scatter forward", f"{size} r={r} {name}",
                    lambda m=m, W=dense: aten_scatter.build(m, W),
                    lambda m=m, W=dense: scatter.build(m, W),
                )  # fmt: skip
                yield (
                    "scatter backward", f"{size} r={r} {name}",
                    lambda m=m, W=dense, g=g, x=x: aten_scatter.contract(m, W, g, x),
                    lambda m=m, W=dense, g=g, x=x: scatter.contract(m, W, g, x),
                )  # fmt: skip


def cases() -> Iterator[Case]:
    for topic in (row_norms, merges, grams, codes, rotations, sampled):
        yield from topic()
