"""Each Triton kernel against float64, in the interpreter where there is no GPU; planted bugs."""

import itertools

import pytest
import torch
import triton_checks as checks
import triton_mutants as mutants

from decomp_kernels.kernels.triton import column_walk, down_projection, up_expansion

# Every dtype and rank, each with a few of the shapes and options, all of which come about.
CELLS = list(itertools.product(checks.DTYPES, checks.RANKS))
cells = pytest.mark.parametrize(
    ("dtype", "r", "number"),
    [(*cell, number) for number, cell in enumerate(CELLS)],
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
grid = pytest.mark.parametrize(
    ("dtype", "r", "shape"),
    list(itertools.product(checks.DTYPES, checks.RANKS, checks.SHAPES)),
    ids=str,
)
half = pytest.mark.parametrize(  # of the cells: every dtype with three ranks, every rank
    ("dtype", "r", "number"),
    [(*cell, n) for n, cell in enumerate(CELLS) if (n + n // 6) % 2],
    ids=["-".join(map(str, cell)) for n, cell in enumerate(CELLS) if (n + n // 6) % 2],
)
BOTH = (False, True)


def shape_of(number):
    return checks.SHAPES[number % 5]  # 5 shapes against 6 ranks: every pair comes about once


def option(number):
    return (number // 6 + number) % 2 == 0  # alternates along the ranks, and along the dtypes


def test_cells_hold_every_shape_with_every_dtype_and_rank():
    for column, values in enumerate((checks.DTYPES, checks.RANKS)):
        for value in values:
            numbers = [n for n, cell in enumerate(CELLS) if cell[column] == value]
            assert {shape_of(n) for n in numbers} == set(checks.SHAPES)
            assert {option(n) for n in numbers} == {False, True}


@cells
def test_down_projection(dtype, r, number):
    checks.down_projection(dtype, r, shape_of(number), option(number), number % 3 > 0)


@half
def test_down_projections_of_one_x(dtype, r, number):
    checks.down_projections(dtype, r, shape_of(number), option(number))


def test_more_than_one_launch_takes():
    for dtype in ("bf16", "bf16-fp32"):
        checks.down_projections(dtype, 3, (7, 33), count=5)
        checks.up_expansions(dtype, 3, (7, 33), count=5)
        checks.walk_columns(dtype, 3, (7, 33), count=5)


def test_more_rows_than_a_block_for_each_share():
    for dtype in ("bf16", "bf16-fp32"):
        checks.column_walk(dtype, 3, (300, 20), True)
        checks.walk_columns(dtype, 3, (300, 20))


def test_activations():
    checks.activations()


@cells
def test_up_expansion(dtype, r, number):
    checks.up_expansion(dtype, r, shape_of(number), not option(number), option(number))


@half
def test_up_expansions_of_one_sum(dtype, r, number):
    checks.up_expansions(dtype, r, shape_of(number))


@cells
def test_column_walk(dtype, r, number):
    checks.column_walk(dtype, r, shape_of(number), option(number))


@half
def test_column_walk_for_several(dtype, r, number):
    checks.walk_columns(dtype, r, shape_of(number))


@cells
def test_row_norm(dtype, r, number):
    checks.row_norm(dtype, r, shape_of(number))


@pytest.mark.full
@grid
def test_the_whole_grid(dtype, r, shape):
    for one, other in itertools.product(BOTH, BOTH):
        checks.down_projection(dtype, r, shape, one, other)
        checks.up_expansion(dtype, r, shape, one, other and not one)
    for dropping in BOTH:
        checks.column_walk(dtype, r, shape, dropping)
    checks.down_projections(dtype, r, shape)
    checks.up_expansions(dtype, r, shape)
    checks.walk_columns(dtype, r, shape)
    checks.row_norm(dtype, r, shape)


def test_a_rank_above_every_block():
    for dtype in ("bf16", "bf16-fp32"):
        checks.down_projection(dtype, 384, (17, 33), True, True)
        checks.up_expansion(dtype, 384, (17, 33), False, True)
        checks.column_walk(dtype, 384, (17, 33), True)
        checks.row_norm(dtype, 384, (17, 33))


@pytest.mark.parametrize("columns", [4, 8, 63, 64, 65, 66, 132, 257, 260])
def test_the_mask_is_that_of_the_definition_for_any_row_length(columns):
    """A row of K elements starts K % 4 into a word of the counter."""
    kept = checks.mask(9, columns)
    seed = torch.tensor(checks.SEED, device=checks.DEVICE)
    eye = torch.eye(columns, device=checks.DEVICE)
    ones = torch.ones(9, columns, device=checks.DEVICE)
    options = {"seed": seed, "dropout": checks.DROPOUT}
    t = down_projection.down_projection(ones, eye, **options)
    assert torch.equal(t != 0, kept)
    out = up_expansion.up_expansion(ones[:, :1], ones[:1], torch.float32, **options)
    assert torch.equal(out != 0, kept)
    _, c, _, _ = column_walk.column_walk(ones, left=torch.eye(9, device=checks.DEVICE), **options)
    assert torch.equal(c != 0, kept)


def test_float32_operands_of_a_bf16_sum_keep_their_low_parts():
    checks.split_products()


def test_no_rows():
    empty, small = torch.empty(0, 12), torch.randn(3, 12)
    left, right = torch.empty(0, 3), small.T
    assert down_projection.down_projection(empty, small).shape == (0, 3)
    assert up_expansion.up_expansion(left, small, torch.float32).shape == (0, 12)
    u, c, s, p = column_walk.column_walk(
        empty, right=right, left=left, other=empty, column_sum=True
    )
    assert u.shape == (0, 3)
    assert c.shape == (3, 12) and not c.any()
    assert s.shape == p.shape == (12,) and not s.any() and not p.any()
    for t, v in down_projection.down_projections(
        empty, [down_projection.Adapter(small, scale=0.5)] * 2
    ):
        assert t.shape == v.shape == (0, 3)
    walked = column_walk.walk_columns(
        empty, [column_walk.Left(left)] * 2, other=empty, scale=torch.ones(12)
    )
    assert walked.scaled.shape == (0, 12)
    assert all(c.shape == (3, 12) and not c.any() for c in walked.c)


def test_same_inputs_same_bits():
    for M in (5, 70):  # with K in shares, and without
        x, down = torch.randn(M, 150).bfloat16(), torch.randn(9, 150)
        seed = torch.tensor(checks.SEED)
        given = [down_projection.Adapter(down, None, seed, 0.2, activation="gelu")] * 2
        lefts = [column_walk.Left(torch.randn(M, 9), seed, 0.2)] * 2
        options = {"other": x, "scale": down[0], "column_sum": True, "right": down.T}
        first, second = (
            (
                *(v for _, v in down_projection.down_projections(x, given)),
                *(walked := column_walk.walk_columns(x, lefts, **options)).c,
                *(walked.u, walked.s, walked.p, walked.scaled),
            )
            for _ in range(2)
        )
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_rows_that_are_not_neighbours_are_read_in_place():
    whole = torch.randn(50, 3, 40)
    x, down = whole[:, 1], torch.randn(5, 40)
    expected = down_projection.down_projection(x.contiguous(), down)
    assert torch.equal(down_projection.down_projection(x, down), expected)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not mutants.survives(mutant)
