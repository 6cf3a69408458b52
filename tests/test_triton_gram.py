"""The grouped Gram penalty in one launch against float64, in the interpreter; planted bugs."""

import itertools

import pytest
import torch
import triton_gram_checks as checks
import triton_gram_mutants as mutants
import triton_mutants

from decomp_kernels.kernels.triton import gram
from decomp_kernels.ops.gram import bwd, fwd, gram_penalty
from decomp_kernels.testing import assert_as_good_as

IMPL = "triton:passes"
CELLS = list(itertools.product(checks.DTYPES, checks.RANKS))
OPTIONS = list(itertools.product("od", (True, False)))
options = pytest.mark.parametrize(("kind", "squared"), OPTIONS, ids=str)


@pytest.mark.parametrize(
    ("dtype", "r", "number"),
    [(*cell, number) for number, cell in enumerate(CELLS)],
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
def test_every_dtype_and_rank(dtype, r, number):
    checks.cell(dtype, r, number, *OPTIONS[(number + number // 6) % 4])


@options
def test_any_shapes_ranks_and_dtypes_in_one_call(kind, squared):
    checks.mixed(kind, squared)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "r"), CELLS, ids=str)
def test_the_whole_grid(dtype, r):
    for number, (kind, squared) in itertools.product(range(5), OPTIONS):
        checks.cell(dtype, r, number, kind, squared)


def test_rows_with_gaps_are_read_in_place():
    checks.gaps()


def test_where_nothing_is_wrong_nothing_moves():
    checks.exact_zero()


def test_empty_matrices():
    for shape in ((3, 0, 0), (3, 8, 0), (0, 8, 5)):
        checks.gram(*checks.make(torch.float32, [shape, (2, 9, 7)]))


def test_one_launch_each_way_for_each_dtype(monkeypatch):
    launched = []
    run = gram._Launch.run

    def counted(self, kernel, *arguments, **constants):
        launched.append((kernel, len(self.rows)))
        run(self, kernel, *arguments, **constants)

    monkeypatch.setattr(gram._Launch, "run", counted)
    checks.mixed("o", True)
    assert len(launched) == 6
    assert {(kernel is gram._forward_kernel, count) for kernel, count in launched} == set(
        itertools.product((True, False), (8, 4))
    )


def test_same_inputs_same_bits():
    downs, ups = checks.make(torch.bfloat16, [(24, 300, 70), (3, 33, 35)])
    slope = torch.tensor(1.0, device=checks.DEVICE)

    def outcome():
        loss, E = gram.forward(downs, ups, "o", False, 0.7)
        return loss, *E, *gram.backward(slope, downs, ups, E, False, 0.7)

    first, second = outcome(), outcome()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@options
def test_the_operator_differentiates(kind, squared):
    shapes = [(4, 12, 9), (2, 5, 7), (4, 12, 9)]
    found = {}
    for impl, dtype in ((IMPL, None), ("aten", None), ("reference", torch.float64)):
        downs, ups = checks.make(torch.bfloat16, shapes)
        tensors = [M.to(dtype or M.dtype).requires_grad_() for M in (*downs, *ups)]
        loss = gram_penalty(tensors[:3], tensors[3:], kind, squared=squared, scale=0.3, impl=impl)
        found[impl] = (loss, *torch.autograd.grad(loss, tensors))
    for index, values in enumerate(zip(*found.values(), strict=True)):
        assert_as_good_as(*values, str(index))


@pytest.mark.parametrize(("kind", "squared"), [("o", True), ("d", False)])
def test_registration(kind, squared):
    downs, ups = checks.make(torch.bfloat16, [(3, 12, 9), (2, 5, 7)])
    torch.library.opcheck(fwd, (downs, ups, kind, squared, 0.5, IMPL))
    loss, residuals = fwd(downs, ups, kind, squared, 0.5, IMPL)
    torch.library.opcheck(bwd, (loss, downs, ups, residuals, squared, 0.5, IMPL))


def test_float64_anywhere_is_refused():
    downs, ups = checks.make(torch.float32, [(3, 12, 9), (3, 12, 9)])
    ups[1] = ups[1].double()
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, and x is float64"):
        gram_penalty(downs, ups, impl=IMPL)


def test_a_recorded_call_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="outside the capture of a CUDA graph.*impl='aten'"):
        gram._on_device(torch.ones(1), torch.device("cuda", 0))


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not triton_mutants.survives(mutant, mutants.run)
