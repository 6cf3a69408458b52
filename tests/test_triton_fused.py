"""The fused Triton kernels against float64, with pointers and with tensor descriptors."""

import itertools

import pytest
import torch
import triton_checks
import triton_fused_checks as checks
import triton_fused_mutants as mutants
from triton_mutants import survives

from decomp_kernels import tables
from decomp_kernels.cli.inspect import LIMITS
from decomp_kernels.kernels.triton import fused_forward as fused_forward_file
from decomp_kernels.kernels.triton import fused_tiles
from decomp_kernels.kernels.triton.fused_forward import fused_forward
from decomp_kernels.kernels.triton.fused_input_gradient import fused_input_gradient

DESCRIBED = ("sm_90", "sm_100", "sm_120")
# (M, K, N): below one tile, off every tile, whole tiles; a row of one; sizes % 4 is 0, 1, 2 and 3.
SHAPES = ((1, 5, 3), (7, 33, 45), (70, 66, 35), (64, 64, 128), (131, 67, 36))
ALIGNED = ((17, 8, 16), (70, 72, 40), (131, 136, 264))  # what descriptors take
CELLS = list(itertools.product(triton_checks.DTYPES, triton_checks.RANKS))
NARROW = [dtype for dtype in triton_checks.DTYPES if dtype != "fp32"]
TERMS = [
    terms
    for count in range(len(checks.TERMS) + 1)
    for terms in itertools.combinations(checks.TERMS, count)
]


def both(dtype, r, sizes, terms=checks.TERMS, dropping=False, arch="any"):
    checks.forward(dtype, r, sizes, terms, arch)
    checks.input_gradient(dtype, r, sizes, terms, dropping, arch)


@pytest.mark.parametrize(
    ("dtype", "r", "number"),
    [(*cell, number) for number, cell in enumerate(CELLS)],
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
def test_every_dtype_and_rank(dtype, r, number):
    both(dtype, r, SHAPES[number % 5], TERMS[(7 * number) % 32], number % 2 == 0)


@pytest.mark.parametrize("dtype", triton_checks.DTYPES)
def test_every_term(dtype):
    for terms in TERMS if dtype == "fp32" else [(), *[(term,) for term in checks.TERMS]]:
        both(dtype, 3, (18, 10, 13), terms, "rank" in terms)


@pytest.mark.parametrize("arch", DESCRIBED)
@pytest.mark.parametrize("dtype", NARROW)
def test_descriptors(arch, dtype):
    number = NARROW.index(dtype) + DESCRIBED.index(arch)
    for terms, dropping in ((checks.TERMS, True), (("rank", "bias"), False)):
        both(dtype, (3, 24)[number % 2], ALIGNED[number % 3], terms, dropping, arch)


@pytest.mark.full
@pytest.mark.parametrize("arch", ["any", *DESCRIBED])
@pytest.mark.parametrize("dtype", triton_checks.DTYPES)
def test_the_whole_grid(arch, dtype):
    for r, sizes in itertools.product(triton_checks.RANKS, (*SHAPES, *ALIGNED)):
        for terms, dropping in ((checks.TERMS, True), (("rank",), False), ((), False)):
            both(dtype, r, sizes, terms, dropping, arch)


def test_more_tiles_than_programs_and_groups():
    both("fp32", 3, (520, 5, 130))


@pytest.mark.parametrize("columns", [4, 63, 66, 132, 257])
def test_the_mask_is_that_of_the_definition(columns):
    dt, down = torch.ones(20, 1), torch.ones(1, columns)
    d_x, _ = fused_input_gradient(
        torch.zeros(20, 6), torch.zeros(6, columns), dt=dt, down=down,
        seed=torch.tensor(checks.SEED), dropout=checks.DROPOUT,
    )  # fmt: skip
    assert torch.equal(d_x != 0, triton_checks.mask(20, columns))


def test_float32_adapters_of_a_bf16_base_lose_nothing_but_the_rounding():
    r, M, N = 24, 70, 130
    v = triton_checks.tensor(M, r, dtype=torch.float32, seed=1)
    up = triton_checks.tensor(N, r, dtype=torch.float32, seed=2)
    x, W = torch.zeros(M, 8).bfloat16(), torch.zeros(N, 8).bfloat16()
    y = fused_forward(x, W, v=v, up=up, scale=0.7)[0].double()
    exact = 0.7 * v.double() @ up.double().T
    dropped = 2**-15 * (v.double().abs() @ up.double().T.abs())  # the product of two low parts
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + dropped).all()


@pytest.mark.parametrize("arch", ["any", "sm_90"])
def test_same_inputs_same_bits(arch):
    given = {
        "out_scale": torch.randn(40), "dt": torch.randn(70, 5), "down": torch.randn(5, 72),
        "seed": torch.tensor(5), "dropout": 0.1, "in_scale": torch.randn(72),
        "x": torch.randn(70, 72).bfloat16(),
    }  # fmt: skip
    dy, W = torch.randn(70, 40).bfloat16(), torch.randn(40, 72).bfloat16()
    with checks.architecture(arch):
        first, second = (fused_input_gradient(dy, W, **given) for _ in range(2))
        assert all(map(torch.equal, first, second))
        first, second = (fused_forward(dy, W.T, keep_z=True, scale=0.3) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("arch", DESCRIBED)
def test_both_forms_give_the_same_bits(arch, monkeypatch):
    """One body: where the tiles are the same, so is the order of the sums."""
    x, W = torch.randn(70, 72).bfloat16(), torch.randn(40, 72).bfloat16()
    shipped = fused_tiles.fused_configuration
    with checks.architecture(arch):
        assert shipped("fused_forward", (x, W), x.dtype, M=70)["DESCRIPTORS"]
        described = fused_forward(x, W)[0]
        monkeypatch.setattr(
            fused_forward_file, "fused_configuration",
            lambda *given, **sizes: {**shipped(*given, **sizes), "DESCRIPTORS": False},
        )  # fmt: skip
        assert torch.equal(described, fused_forward(x, W)[0])


def test_which_tensors_have_descriptors():
    whole = torch.randn(10, 16).bfloat16()
    assert fused_tiles.describable(whole)
    assert fused_tiles.describable(whole[2:, 8:])
    assert not fused_tiles.describable(whole[:, 1:9])  # the base
    assert not fused_tiles.describable(torch.randn(10, 12).bfloat16())  # the stride
    assert not fused_tiles.describable(whole.T)
    assert not fused_tiles.describable(whole[:1].expand(10, 16))
    assert not fused_tiles.describable(whole[:0])


def test_odd_tensors_take_pointers_on_every_architecture():
    for arch in LIMITS:
        both("bf16", 3, (18, 9, 13), arch=arch)


def test_rows_that_are_not_neighbours_are_read_in_place():
    whole = torch.randn(50, 3, 40)
    x, W = whole[:, 1], torch.randn(7, 80)[:, ::2]
    assert torch.equal(fused_forward(x, W)[0], fused_forward(x.contiguous(), W.contiguous())[0])
    d_x, _ = fused_input_gradient(x, W.T.contiguous())
    assert torch.equal(fused_input_gradient(x.contiguous(), W.T)[0], d_x)


def test_no_rows():
    W = torch.randn(6, 12)
    y, z = fused_forward(torch.empty(0, 12), W, torch.randn(6), keep_z=True)
    assert y.shape == z.shape == (0, 6)
    options = {"in_scale": torch.ones(12), "x": torch.empty(0, 12)}
    d_x, d_in = fused_input_gradient(torch.empty(0, 6), W, **options)
    assert d_x.shape == (0, 12)
    assert d_in.shape == (12,) and not d_in.any()


def test_only_what_is_asked_for_is_made():
    x, W, dy = torch.randn(5, 8), torch.randn(6, 8), torch.randn(5, 6)
    assert fused_forward(x, W)[1] is None
    d_x, d_in = fused_input_gradient(dy, W, in_scale=torch.ones(8), x=x, need_x=False)
    assert d_x is None
    torch.testing.assert_close(d_in, (x * (dy @ W)).sum(0))
    assert fused_input_gradient(dy, W)[1] is None


@pytest.mark.parametrize("kernel", ["fused_forward", "fused_input_gradient"])
def test_both_forms_are_shipped_where_there_is_a_copy_engine(kernel):
    shipped = tables.shipped(kernel)
    for arch in DESCRIBED:
        assert any(e["arch"] == arch and e["config"]["DESCRIPTORS"] for e in shipped)
    assert not any(e["config"]["DESCRIPTORS"] for e in shipped if e["arch"] not in DESCRIBED)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not survives(mutant, mutants.run)
