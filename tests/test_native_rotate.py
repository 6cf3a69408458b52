"""The host kernels of block_rotate, at every level of this machine, against float64."""

import pytest
import torch
from test_native_norm import random

import decomp_kernels as dk
from decomp_kernels import dispatch, native_library
from decomp_kernels.bench.observed import Observed
from decomp_kernels.factors import BlockRotate
from decomp_kernels.kernels.aten import block_rotate as aten
from decomp_kernels.kernels.native import block_rotate
from decomp_kernels.ops import block_rotate as operator
from decomp_kernels.reference import block_rotate as reference
from decomp_kernels.testing import assert_as_good_as

DTYPES = (torch.float32, torch.bfloat16)
# (M, q, b): tails of rows and of lanes, groups that are not full, a block wider than a group.
SHAPES = [
    (0, 2, 3), (1, 1, 1), (7, 4, 3), (33, 5, 32), (70, 9, 16), (64, 3, 24), (31, 2, 130),
    (100, 300, 2),
]  # fmt: skip

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", DTYPES, ids=str)
def test_rotations_match_the_definition(shape, dtype, small, level):
    M, q, b = shape
    x, gx, weight = (random(M, q * b, dtype=dtype, seed=i) for i in range(3))
    m = BlockRotate(random(1, q, b, b, dtype=small, seed=3))
    exact = BlockRotate(m.blocks.double())
    for function, arguments in (
        ("forward", (x,)),
        ("build", (weight,)),
        ("backward", (gx, x)),
    ):
        ours, eager, true = (
            getattr(of, function)(blocks, *(t.to(kind) for t in arguments))
            for of, blocks, kind in (
                (block_rotate, m, dtype), (aten, m, dtype), (reference, exact, torch.float64)
            )
        )  # fmt: skip
        if function != "backward":
            ours, eager, true = (ours,), (eager,), (true,)
        for one, other, right in zip(ours, eager, true, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert_as_good_as(one, other, right, function)


@dtypes
def test_the_gradient_through_a_weight(dtype, level):
    weight, g, x = (random(*shape, dtype=dtype) for shape in ((40, 48), (9, 40), (9, 48)))
    m = BlockRotate(random(1, 6, 8, 8))
    exact = reference.contract(
        BlockRotate(m.blocks.double()), weight.double(), g.double(), x.double()
    )
    assert_as_good_as(
        block_rotate.contract(m, weight, g, x), aten.contract(m, weight, g, x), exact, "blocks"
    )


def test_rotations_do_not_depend_on_the_number_of_threads(level, threads):
    for dtype in DTYPES:
        x, gx = (random(700, 320, dtype=dtype, seed=i) for i in range(2))
        m = BlockRotate(random(1, 20, 16, 16))
        results = []
        for count in threads:
            torch.set_num_threads(count)
            results.append((block_rotate.forward(m, x), *block_rotate.backward(m, gx, x)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_wrong_calls_say_what_is_wrong(level):
    ops = native_library.ops()
    x, blocks = random(5, 12), random(4, 3, 3)
    for x_, blocks_, says in (
        (x[0], blocks, r"x must have shape \(any, any\), got \(12\)"),
        (x.double(), blocks, "x must be float32 or bfloat16"),
        (x.T.contiguous().T, blocks, "x must be contiguous"),
        (x, blocks.bfloat16(), "blocks must be Float, got BFloat16"),
        (
            x,
            blocks[:3].contiguous(),
            r"blocks must be \(q, b, b\) with q \* b = 12, got \(3, 3, 3\)",
        ),
        (x, random(4, 3, 2), r"blocks must be \(q, b, b\) with q \* b = 12, got \(4, 3, 2\)"),
        (random(5, 0), random(0, 3, 3), r"blocks must be .* got \(0, 3, 3\)"),
    ):
        with pytest.raises(RuntimeError, match=f"block_rotate: {says}"):
            ops.block_rotate(x_, blocks_)
        with pytest.raises(RuntimeError, match=f"block_rotate_bwd: {says}"):
            ops.block_rotate_bwd(x_, x_, blocks_)
    for gx, says in (
        (x[:4], r"gx must have shape \(5, 12\), got \(4, 12\)"),
        (x.bfloat16(), "gx must be Float, got BFloat16"),
    ):
        with pytest.raises(RuntimeError, match=f"block_rotate_bwd: {says}"):
            ops.block_rotate_bwd(gx, x, blocks)


def test_schemas(level):
    ops, x, blocks = native_library.ops(), random(5, 12), random(4, 3, 3)
    for op, arguments in ((ops.block_rotate, (x, blocks)), (ops.block_rotate_bwd, (x, x, blocks))):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema",))


def test_auto_takes_them_for_one_factor_alone(measured_level):
    """A method of several factors, or of columns in another order, keeps library calls."""
    two = dk.BOFT(block_size=8, n_butterfly_factor=2)
    for method, family in ((dk.OFT(block_size=8), "native"), (two, "aten")):
        layer = dk.DecomposedLinear(torch.nn.Linear(64, 48), method)
        with Observed() as observed:
            layer(torch.randn(5, 64, requires_grad=True)).sum().backward()
        called = {call: n for call, n in observed.calls.items() if call[0] == "block_rotate"}
        assert called == {("block_rotate", name, family): 1 for name in ("forward", "backward")}


def test_a_named_form_is_refused_where_there_is_none():
    m = BlockRotate(torch.eye(4).expand(1, 3, 4, 4), torch.arange(12).flip(0)[None])
    if dispatch.why_not(torch.ones(1), "native:passes"):
        pytest.skip("no native library")
    with pytest.raises(RuntimeError, match="this operator has no such implementation yet"):
        operator.forward(m, torch.ones(2, 12), "native:passes")
