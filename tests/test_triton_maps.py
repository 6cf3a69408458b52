"""The weight maps' and merging's Triton kernels against float64; the operator with each map."""

import itertools

import pytest
import test_block_rotate
import test_double_hadamard
import test_hadamard
import test_scatter
import test_singular_diagonal
import torch
import triton_checks
import triton_maps_checks as checks
import triton_maps_mutants as mutants
import weight_maps
from torch import nn
from triton_mutants import survives

import decomp_kernels as dk
from decomp_kernels.factors import BlockRotate, DoubleHadamard, Hadamard, Scatter, SingularDiagonal
from decomp_kernels.kernels.triton import (
    block_rotate,
    double_hadamard,
    hadamard,
    scatter,
    singular_diagonal,
)
from decomp_kernels.ops import map_ops
from decomp_kernels.ops.merged_weight import merged_weight
from decomp_kernels.reference.decomposed_linear import merged_weight as definition
from decomp_kernels.testing import assert_as_good_as

IMPL = "triton:passes"
# kind, dense formula, tensors(N, K, dtype), options
MAPS = {
    "hadamard": (Hadamard, test_hadamard.dense, test_hadamard.tensors,
                 {"scale": test_hadamard.SCALE}),
    "double_hadamard": (DoubleHadamard, test_double_hadamard.dense, test_double_hadamard.tensors,
                        {"scale": test_double_hadamard.SCALE}),
    "singular_diagonal": (SingularDiagonal, test_singular_diagonal.dense,
                          test_singular_diagonal.tensors, {}),
    "scatter": (Scatter, test_scatter.dense, test_scatter.tensors, {}),
    "block_rotate": (BlockRotate, test_block_rotate.dense,
                     lambda N, K, dtype: test_block_rotate.tensors((N, 2, K // 4, 4), dtype), {}),
}  # fmt: skip
DTYPES = [dtype for dtype in weight_maps.DTYPES if dtype != "fp64"]
maps = pytest.mark.parametrize("name", MAPS)
dtypes = pytest.mark.parametrize("dtype", triton_checks.DTYPES)
CELLS = list(itertools.product(triton_checks.DTYPES, triton_checks.RANKS))
cells = pytest.mark.parametrize(
    ("dtype", "r", "number"),
    [(*cell, number) for number, cell in enumerate(CELLS)],
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
# m, q, b and rows: blocks of no power of two, of 2, larger than a tile, of whole tiles
ROTATIONS = (((3, 12, 3), 18), ((1, 20, 2), 33), ((1, 1, 70), 40), ((2, 2, 16), 1))


def shape_of(number):
    return checks.SHAPES[number % 5]


@cells
def test_hadamard_kernels(dtype, r, number):
    checks.hadamard(dtype, r, shape_of(number))


@cells
def test_merged_weight(dtype, r, number):
    checks.merged_weight(dtype, r, shape_of(number), number % 2 == 0)


@dtypes
def test_double_hadamard_kernels(dtype):
    for r, shape in zip((1, 16, 20), checks.SHAPES, strict=False):
        checks.double_hadamard(dtype, r, shape)


@dtypes
def test_singular_diagonal_kernels(dtype):
    checks.singular_diagonal(dtype, 70, (70, 35, 100), False)
    checks.singular_diagonal(dtype, 3, (33, 70, 37), True)


@dtypes
@pytest.mark.parametrize("count", [1, 32, 50])
def test_scatter_kernels(count, dtype):
    checks.scatter(dtype, count, (33, 70, 200))


@dtypes
def test_block_rotate_kernels(dtype):
    for number, (blocks, rows) in enumerate(ROTATIONS):
        checks.block_rotate(dtype, blocks, rows, permuted=number % 2 == len(dtype) % 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-fp32"])
def test_programs_of_several_tiles(dtype):
    """Sums in memory, shares, row blocks and rank blocks that large tensors have."""
    with checks.walking("hadamard"):
        checks.hadamard(dtype, 20, (33, 70, 37))
    with checks.walking("double_hadamard"):
        checks.double_hadamard(dtype, 5, (33, 70, 9))
    with checks.walking("singular_diagonal", RANKS=8):
        checks.singular_diagonal(dtype, 40, (33, 70, 100), False)
        checks.singular_diagonal(dtype, 20, (33, 70, 3), True)
    with checks.walking("block_rotate", ELEMENTS=40 * 36):
        checks.block_rotate(dtype, (2, 12, 3), 70, True)


@pytest.mark.full
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@cells
def test_the_whole_grid(dtype, r, number, shape):
    checks.merged_weight(dtype, r, shape, number % 2 == 1)
    for walking in (False, True):
        changes = {"RANKS": 16} if walking else {}
        if walking:
            with checks.walking("hadamard"), checks.walking("double_hadamard"):
                checks.hadamard(dtype, r, shape)
                checks.double_hadamard(dtype, r, shape)
        else:
            checks.hadamard(dtype, r, shape)
            checks.double_hadamard(dtype, r, shape)
        with checks.walking("singular_diagonal", **changes):
            N, K, M = shape
            checks.singular_diagonal(dtype, r, shape, M * r * (N + K) <= N * K * (M + r))
    checks.scatter(dtype, r, shape)
    if r == 1:
        for permuted in (False, True):
            checks.block_rotate(dtype, (2, 1, 256), shape[0], permuted)


@maps
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_with_a_map(dtype, name):
    kind, dense, tensors, options = MAPS[name]
    N, K = 33, 16
    for tokens in ((40,), (2, 3)):
        terms = weight_maps.layer(N, K, dtype, tokens, terms=("bias", "out_scale"))
        weight_maps.check(kind, dense, tensors(N, K, dtype), terms, IMPL, **options)


@maps
def test_with_the_other_terms(name):
    kind, dense, tensors, options = MAPS[name]
    for terms in (("in_scale", "out_scale", "bias"), ("down", "up", "core")):
        others = weight_maps.layer(9, 12, "bf16-fp32", terms=terms)
        weight_maps.check(kind, dense, tensors(9, 12, "bf16-fp32"), others, IMPL, **options)


@maps
def test_weights_of_any_strides(name):
    kind, _, tensors, options = MAPS[name]
    m = kind(**{k: v.detach() for k, v in tensors(34, 12, "fp32").items()}, **options)
    weight = torch.randn(12, 34).T
    op = map_ops.MAP_OPS[m.op]
    assert torch.equal(op.build(m, weight, IMPL), op.build(m, weight.contiguous(), IMPL))
    g, x = torch.randn(5, 34), torch.randn(5, 12)
    one, other = (op.contract(m, w, g, x, IMPL) for w in (weight, weight.contiguous()))
    for strided, plain in zip(one, other, strict=True):
        assert strided is None or torch.allclose(strided, plain, rtol=1e-5, atol=1e-5)


@maps
def test_no_tokens(name):
    kind, _, tensors, options = MAPS[name]
    mapped, terms = tensors(9, 12, "fp32"), weight_maps.layer(9, 12, "fp32", tokens=(0,))
    m = kind(**mapped, **options)
    y = dk.decomposed_linear(**terms, weight_map=m, impl=IMPL)
    y.sum().backward()
    assert y.shape == (0, 9)
    assert not any(t.grad.any() for t in mapped.values() if t.requires_grad)


def test_same_inputs_same_bits():
    _, W, g, x = checks.sized("bf16-fp32", (70, 40, 37))
    up, down = torch.randn(70, 5), torch.randn(5, 40)
    places = torch.randperm(70 * 40)[:50]
    blocks, d = torch.randn(1, 4, 10, 10), torch.randn(5)
    for module, m in (
        (hadamard, Hadamard(up, down)),
        (double_hadamard, DoubleHadamard(up, down, up, down)),
        (singular_diagonal, SingularDiagonal(up, d, down)),
        (scatter, Scatter(places // 40, places % 40, torch.randn(50))),
        (block_rotate, BlockRotate(blocks)),
    ):
        first, second = (
            (module.build(m, W), *_tuple(module.contract(m, W, g, x))) for _ in range(2)
        )
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


@maps
def test_registration(name):
    _, _, tensors, options = MAPS[name]
    mapped = {k: v.detach() for k, v in tensors(9, 12, "bf16-fp32").items()}
    W, g, x = (torch.randn(*size).bfloat16() for size in ((9, 12), (4, 9), (4, 12)))
    op = map_ops.MAP_OPS[name]
    arguments = (*mapped.values(), *options.values(), IMPL)
    torch.library.opcheck(op.build_op, (W, *arguments))
    torch.library.opcheck(op.contract_op, (W, g, x, *arguments))
    if op.ACTS_ON_INPUT:
        torch.library.opcheck(op.fwd_op, (x, *arguments))
        torch.library.opcheck(op.bwd_op, (x, x, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "dora", "ssb", "hira", "oft", "adalora"])
def test_merging_a_layer(name, dtype):
    method, linear, merged = dk.methods()[name], nn.Linear(20, 16).to(dtype), {}
    for impl in ("auto", IMPL):
        torch.manual_seed(1)
        options = {f: v for f, v in vars(method.small()).items() if f != "impl"}
        layer = dk.DecomposedLinear(linear, method(**options, impl=impl))
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        layer.merge()
        merged[impl] = layer.weight
    assert not torch.equal(merged["auto"], linear.weight)
    assert_as_good_as(merged[IMPL], merged["auto"], merged["auto"], name)


def test_merging_runs_the_kernel_where_it_can(monkeypatch):
    weight, scale = torch.randn(6, 5), torch.randn(5)
    given = (None, None, None, scale, None, 1.0)
    called = []
    from decomp_kernels.kernels.triton import merged_weight as kernel

    plain = kernel.merged_weight
    monkeypatch.setattr(kernel, "merged_weight", lambda *a: called.append(1) or plain(*a))
    torch.testing.assert_close(merged_weight(weight, *given, IMPL), definition(weight, *given))
    assert called == [1]
    for impl, W in ((IMPL, weight.double()), ("auto", weight), ("aten", weight)):
        assert torch.equal(merged_weight(W, *given, impl), definition(W, *given))
    assert called == [1]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not survives(mutant, mutants.run)
