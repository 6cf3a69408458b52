"""Calls every host operator and the autograd node, as scripts/sanitize.py built them, with what
hypothesis makes.
"""

import argparse
import time

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from decomp_kernels import native_library

LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
SIZES = st.one_of(st.integers(0, 40), st.integers(0, 300))
BIG = st.sampled_from([torch.float32, torch.bfloat16])
CALLS: list = []


def call(function):
    CALLS.append(function)
    return function


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def some(data, *shape, dtype=torch.float32):
    """A tensor or None."""
    return drawn(*shape, dtype=dtype) if data.draw(st.booleans()) else None


def small(data, big):
    return data.draw(st.sampled_from([big, torch.float32]))


def mask(data):
    seed = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1)))
    return seed, data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.999]))


@call
def down_projection(data, ops, M, N, r, dtype):
    adapter = small(data, dtype)
    seed, p = mask(data)
    phi = data.draw(st.sampled_from(["identity", "relu", "silu", "gelu", "tanh"]))
    scale = data.draw(st.sampled_from([1.0, 0.5]))
    core = some(data, r)
    ops.down_projection(
        drawn(M, N, dtype=dtype), drawn(r, N, dtype=adapter), core, seed, scale, p, phi
    )


@call
def column_walk(data, ops, M, N, r, dtype):
    adapter = small(data, dtype)
    seed, p = mask(data)
    ops.column_walk(
        drawn(M, N, dtype=dtype), some(data, N, r, dtype=adapter), some(data, M, r, dtype=adapter),
        some(data, M, N, dtype=dtype), some(data, N), seed, p, data.draw(st.booleans()),
        data.draw(st.booleans()),
    )  # fmt: skip


@call
def up_expansion(data, ops, M, N, r, dtype):
    adapter = small(data, dtype)
    seed, p = mask(data)
    ops.up_expansion(
        drawn(M, r, dtype=adapter), drawn(r, N, dtype=adapter), some(data, N),
        some(data, M, N, dtype=dtype), seed, p, dtype,
    )  # fmt: skip


@call
def row_norm(data, ops, M, N, r, dtype):
    adapter = small(data, dtype)
    weight, down, up = (
        drawn(M, N, dtype=dtype), drawn(r, N, dtype=adapter), drawn(M, r, dtype=adapter)
    )  # fmt: skip
    squares = ops.squared_rows(weight)
    norm = ops.row_norm_fwd(weight, squares, down, up, 0.7)
    ops.row_norm_bwd(drawn(M), norm, weight, down, up, 0.7)


@call
def merged_weight(data, ops, M, N, r, dtype):
    branch = data.draw(st.booleans())
    adapter = small(data, dtype)
    down, up = (drawn(r, N, dtype=adapter), drawn(M, r, dtype=adapter)) if branch else (None, None)
    core = some(data, r) if branch else None
    ops.merged_weight(drawn(M, N, dtype=dtype), down, up, core, some(data, N), some(data, M), 0.7)


@call
def gram(data, ops, M, N, r, dtype):
    count = data.draw(st.integers(1, 4))
    of_rows = data.draw(st.booleans())
    matrices = [drawn(*((r, N) if of_rows else (M, r)), dtype=dtype) for _ in range(count)]
    residual, _ = ops.gram_fwd(matrices, of_rows, data.draw(st.booleans()))
    ops.gram_bwd(matrices, residual, drawn(count), of_rows)


@call
def dequantize(data, ops, M, N, r, dtype):
    if data.draw(st.booleans()):
        ops.dequantize(
            torch.randint(-128, 128, (M, N), dtype=torch.int8), drawn(M), "int8", M, N, dtype
        )
        return
    block = data.draw(st.sampled_from([32, 64, 128]))
    codes = torch.randint(0, 256, (-(-M * N // 2), 1), dtype=torch.uint8)
    ops.dequantize(codes, drawn(-(-M * N // block)), "nf4", M, N, dtype)


@call
def block_rotate(data, ops, M, N, r, dtype):
    blocks = drawn(data.draw(st.integers(1, 9)), r + 1, r + 1)
    x, gx = (drawn(M, len(blocks) * (r + 1), dtype=dtype) for _ in range(2))
    ops.block_rotate(x, blocks)
    ops.block_rotate_bwd(gx, x, blocks)


@call
def scatter(data, ops, M, N, r, dtype):
    count = data.draw(st.integers(0, 50)) if M else 0
    rows, cols = torch.randint(max(M, 1), (count,)), torch.randint(r + 1, (count,))
    ops.sampled_products(drawn(M, N, dtype=dtype), drawn(r + 1, N, dtype=dtype), rows, cols)
    values = drawn(count, dtype=small(data, dtype))
    ops.scattered_sum(drawn(M, r + 1, dtype=dtype), rows, cols, values)


@call
def autograd_node(data, ops, M, N, r, dtype):
    """csrc/autograd, forward and backward, with some terms and some gradients: by library calls or
    host kernels, and by these both ways with dropout and a float32 branch too.
    """
    K = data.draw(SIZES)
    branch = data.draw(st.booleans())
    passes = data.draw(st.integers(0, 3))
    small = torch.float32 if passes == 3 and data.draw(st.booleans()) else dtype
    down, up = (drawn(r, K, dtype=small), drawn(N, r, dtype=small)) if branch else (None, None)
    core = some(data, r) if branch else None
    mask = (torch.tensor(5), 0.3) if passes == 3 and data.draw(st.booleans()) else (None, 0.0)
    terms = [some(data, N, dtype=dtype), down, up, core, some(data, K), some(data, N)]
    x = drawn(M, K, dtype=dtype)
    for leaf in (x, *terms):
        if leaf is not None:
            leaf.requires_grad_(data.draw(st.booleans()))
    weight = drawn(N, K, dtype=dtype)
    y = native_library.autograd_node()(x, weight, *terms, mask[0], 0.7, mask[1], passes)
    if y.requires_grad:
        y.sum().backward(create_graph=data.draw(st.booleans()))


def some_calls(function, number, ops, levels, made):
    """A test of one operator with examples of its own."""

    @seed(number)
    @settings(
        max_examples=40, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        data=st.data(), M=SIZES, N=SIZES, r=st.integers(0, 70), dtype=BIG,
        level=st.sampled_from(levels), threads=st.integers(1, 3),
    )  # fmt: skip
    def one(data, M, N, r, dtype, level, threads):
        torch.set_num_threads(threads)
        native_library.set_cpu_level(level)
        made[function.__name__] += 1
        function(data, ops, M, N, r, dtype)

    return one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--planted", action="store_true", help="read outside on purpose")
    args = parser.parse_args()
    ops = native_library.ops()
    if args.planted:
        short = torch.randn(8, 64)
        short.untyped_storage().resize_(8 * 64 * 4 - 4)  # the last element is gone
        ops.squared_rows(short)
        return 0
    levels = LEVELS[: LEVELS.index(str(native_library.cpu_level())) + 1]
    made = dict.fromkeys((function.__name__ for function in CALLS), 0)
    until, number = time.monotonic() + args.seconds, 0
    while time.monotonic() < until:
        for function in CALLS:
            number += 1
            some_calls(function, number, ops, levels, made)()
    counts = ", ".join(f"{name} {count}" for name, count in made.items())
    print(f"sanitize: no fault at levels {', '.join(levels)}; calls: {counts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
