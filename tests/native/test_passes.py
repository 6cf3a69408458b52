"""The CUDA device passes, their own source run on the host, against the definitions in float64."""

import ctypes

import passes_checks as checks
import passes_mutants as mutants
import pytest
import torch
from emulator import HERE, EmulationError, build, call

DTYPES = pytest.mark.parametrize("dtype", checks.DTYPES)
RANKS = pytest.mark.parametrize("r", [1, 7, 16, 33, 64, 70])
ORDERS = (0, 5, 77)  # of blocks and warps


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    return build(HERE / "passes_emulation.cpp", folder / "passes.so")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The same with every load and store watched for races."""
    folder = tmp_path_factory.mktemp("passes_watched")
    return build(HERE / "passes_emulation.cpp", folder / "passes.so", races=True)


@DTYPES
@RANKS
def test_down_projection(library, dtype, r):
    checks.down_projection(library, dtype, (70, 130), r)
    checks.down_projection(
        library, dtype, (67, 200), r, drop=True, scaled=True, core=True, phi="gelu"
    )


@DTYPES
@pytest.mark.parametrize("phi", ["identity", "relu", "silu", "gelu", "tanh"])
def test_down_projection_of_each_activation(library, dtype, phi):
    checks.down_projection(library, dtype, (5, 40), 9, core=True, phi=phi)


@DTYPES
@pytest.mark.parametrize(("shape", "extra"), [((1, 1), 0), ((3, 600), 8), ((65, 131), 5)])
@pytest.mark.parametrize("want", ["t", "v", "tv"])
def test_down_projection_of_rows_apart(library, dtype, shape, extra, want):
    for sms in (1, 7):  # K whole, and in shares
        checks.down_projection(library, dtype, shape, 16, extra=extra, want=want, sms=sms)


@DTYPES
def test_down_projection_to_float32(library, dtype):
    t, _ = checks.down_projection(
        library, dtype, (40, 300), 16, t_dtype=torch.float32, want="t", sms=3
    )
    assert t.dtype == torch.float32


@DTYPES
@RANKS
def test_column_walk(library, dtype, r):
    checks.column_walk(library, dtype, (70, 131), r, r, sums=True, other=True)
    checks.column_walk(library, dtype, (131, 264), 0, r, drop=True, sms=7)


@DTYPES
@pytest.mark.parametrize("sms", [1, 7])
def test_column_walk_with_every_option(library, dtype, sms):
    every = {"drop": True, "sums": True, "other": True, "scaled": ("big", "other"), "sms": sms}
    checks.column_walk(library, dtype, (100, 131), 5, 40, extra=5, **every)
    checks.column_walk(library, dtype, (100, 264), 40, 5, **every)
    checks.column_walk(library, dtype, (33, 72), 0, 0, in_place=True, **every)


@DTYPES
@pytest.mark.parametrize("option", ["u", "s", "p", "scaled_big"])
def test_column_walk_with_one_option(library, dtype, option):
    options = {
        "s": {"sums": True}, "p": {"other": True}, "scaled_big": {"scaled": ("big",)}, "u": {},
    }[option]  # fmt: skip
    found = checks.column_walk(library, dtype, (70, 300), 7 if option == "u" else 0, 0, **options)
    assert sum(one is not None for one in found) == 1


def test_column_walk_over_no_rows(library):
    _, c, s, p, _, _ = checks.column_walk(library, "bf16", (0, 40), 3, 5, sums=True, other=True)
    assert not c.any() and not s.any() and not p.any()


@DTYPES
@RANKS
@pytest.mark.parametrize("is_up", [False, True], ids=["down", "up"])
def test_up_expansion(library, dtype, r, is_up):
    checks.up_expansion(library, dtype, (70, 130), r, is_up=is_up, drop=True)
    checks.up_expansion(library, dtype, (65, 136), r, is_up=is_up, bias=True, addend=True)


@DTYPES
def test_up_expansion_onto_its_addend(library, dtype):
    checks.up_expansion(library, dtype, (66, 264), 8, drop=True, addend=True, in_place=True)


@DTYPES
@pytest.mark.parametrize("r", [0, 1, 16, 33])
def test_merged_weight(library, dtype, r):
    checks.merged_weight(library, dtype, (70, 130), r, core=r > 0, scales=True)
    checks.merged_weight(library, dtype, (65, 136), r, transposed=True)


@pytest.mark.parametrize("dtype", checks.CODES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 131), (33, 128)], ids=str)
def test_widening(library, dtype, shape):
    checks.int8(library, dtype, shape)
    for blocksize in (16, 64):
        checks.nf4(library, dtype, shape, blocksize)


@DTYPES
@RANKS
def test_row_norm(library, dtype, r):
    checks.row_norm(library, dtype, (70, 131), r)
    checks.row_norm(library, dtype, (9, 520), r, sms=4)


def test_row_norm_starts_at_the_root_of_the_squares(library):
    W, A, B = torch.randn(20, 72), torch.randn(4, 72), torch.zeros(20, 4)
    squares, norm = torch.empty(20), torch.empty(20)
    call(library, "run_squared_rows", W, 0, 20, 72, squares, 1)
    call(library, "run_row_norm", W, 0, A, B, 0, 20, 72, 4, squares, 2.0, norm, 1, 1)
    assert torch.equal(norm, squares.double().sqrt().float())  # rounded as IEEE 754 has it


def test_what_is_dropped_does_not_count(library):
    x = torch.ones(6, 40)
    x[~checks.mask(6, 40)] = torch.nan
    A, t = torch.randn(3, 40), torch.empty(6, 3)
    seed, threshold = checks.dropping(True)
    call(
        library, "run_down_projection", x, 0, 40, A, 0, 6, 40, 3, None, seed, threshold, None, 1.0,
        0, t, 0, None, 1, 1,
    )  # fmt: skip
    exact = (checks.mask(6, 40).double() @ A.double().T) / checks.kept_fraction(checks.DROPOUT)
    torch.testing.assert_close(t.double(), exact, atol=1e-5, rtol=1e-5)


@DTYPES
def test_the_same_bits_in_any_order_of_blocks(library, dtype):
    def results(order):
        yield from checks.down_projection(
            library, dtype, (130, 300), 20, drop=True, sms=7, order=order
        )
        yield from checks.column_walk(
            library, dtype, (130, 300), 20, 20, drop=True, sums=True, other=True,
            scaled=("big", "other"), sms=7, order=order,
        )  # fmt: skip
        yield checks.up_expansion(library, dtype, (130, 300), 20, drop=True, order=order)
        yield checks.merged_weight(library, dtype, (130, 300), 20, order=order)
        yield from checks.row_norm(library, dtype, (130, 72), 20, sms=7, order=order)

    first, *others = (list(results(order)) for order in ORDERS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("run", mutants.RUNS.values(), ids=mutants.RUNS)
def test_no_races(watched, run):
    run(watched)


@DTYPES
@RANKS
def test_fragments_come_without_bank_conflicts(library, dtype, r):
    count = library.count_bank_conflicts
    count.restype = ctypes.c_int64
    for run in (
        lambda: checks.down_projection(library, dtype, (64, 128), r),
        lambda: checks.column_walk(library, dtype, (64, 256), r, r),
        lambda: checks.up_expansion(library, dtype, (64, 128), r),
        lambda: checks.up_expansion(library, dtype, (64, 128), r, is_up=True),
    ):
        run()
        assert count() == 0


def test_nothing_of_no_size_is_launched(library):
    checks.down_projection(library, "bf16", (0, 40), 3)
    checks.column_walk(library, "bf16", (40, 0), 3, 3, sums=True)
    checks.up_expansion(library, "bf16", (0, 40), 3)
    checks.up_expansion(library, "bf16", (40, 0), 3)
    checks.merged_weight(library, "bf16", (0, 40), 3)
    checks.nf4(library, torch.bfloat16, (0, 40), 64)
    checks.int8(library, torch.bfloat16, (0, 40))


def test_says_why_it_refuses(library):
    def refuses(reason, run, *arguments):
        with pytest.raises(EmulationError, match=reason):
            run(library, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checks.DTYPES, "mixed", (torch.float32, torch.bfloat16))
        for reason, run, ranks in (
            ("x's dtype or float32", checks.down_projection, (2,)),
            ("big's dtype or float32", checks.column_walk, (2, 2)),
            ("out's dtype or float32", checks.up_expansion, (2,)),
            ("the weight's dtype or float32", checks.merged_weight, (2,)),
            ("the weight's dtype or float32", checks.row_norm, (2,)),
        ):
            refuses(reason, run, "mixed", (4, 8), *ranks)
    refuses("a power of two", checks.nf4, torch.float32, (4, 8), 48)
    call(library, "set_arch", 75)
    try:
        for run in mutants.RUNS.values():
            refuses("compute capability 8.0", run)
    finally:
        call(library, "set_arch", 80)


# One or two of each pass; the others are run with `make check-all`.
_FEW = {
    "no wait for the copies", "the second sums over the first", "the sums over the factors",
    "rows for columns in W", "no limit on the codes", "a correction left out of dA",
}  # fmt: skip


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(one, marks=() if one.what in _FEW else pytest.mark.full)
        for one in mutants.MUTANTS
    ],
    ids=lambda mutant: f"{mutant.file}: {mutant.what}",
)
@pytest.mark.usefixtures("library")  # which finds the compiler, or skips
def test_a_planted_bug_is_found(mutant, tmp_path):
    assert not mutants.survives(mutant, tmp_path)
