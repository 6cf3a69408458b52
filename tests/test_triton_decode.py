"""The kernel for few rows against float64, in the interpreter; its counters; planted bugs."""

import itertools

import pytest
import torch
import triton_decode_checks as checks
import triton_decode_mutants as mutants
import triton_mutants

from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.kernels.triton import decode

CELLS = list(itertools.product(checks.DTYPES, checks.RANKS))
cells = pytest.mark.parametrize(
    ("dtype", "r", "number"),
    [(*cell, number) for number, cell in enumerate(CELLS)],
    ids=["-".join(map(str, cell)) for cell in CELLS],
)
term_sets = [
    terms for n in range(len(checks.TERMS) + 1) for terms in itertools.combinations(checks.TERMS, n)
]


@cells
def test_every_dtype_and_rank(dtype, r, number):
    """Each with one of the shapes; large ranks, slow in the interpreter, with the small ones."""
    shape = checks.SHAPES[number % (5 if r < 64 else 2)]
    checks.decode(dtype, r, shape, activation=ACTIVATIONS[number % len(ACTIVATIONS)])


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "base"])
def test_every_combination_of_terms(branch):
    for number, terms in enumerate(term_sets):
        if branch or "core" not in terms:
            dtype = list(checks.DTYPES)[number % 5]
            checks.decode(dtype, 5, (3, 21, 18), terms, branch)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "r", "shape"),
    list(itertools.product(checks.DTYPES, checks.RANKS, checks.SHAPES)),
    ids=str,
)
def test_the_whole_grid(dtype, r, shape):
    for activation in ACTIVATIONS:
        checks.decode(dtype, r, shape, activation=activation)


def test_activations_element_by_element():
    checks.activations()


def test_nothing_is_rounded_before_y():
    checks.cancelling_terms()


def test_float32_adapters_keep_float32_precision():
    checks.branch_precision()


def test_same_inputs_same_bits_and_counters_left_at_zero():
    given = checks.make("bf16", 20, (7, 600, 70))
    first = decode.decode(**given, scale=0.7, activation="silu")
    assert decode._arrived
    for _ in range(2):
        again = decode.decode(**given, scale=0.7, activation="silu")
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        assert not any(counters.any() for counters in decode._arrived.values())


def test_counters_are_kept_and_grow():
    device = torch.device(checks.DEVICE)
    small = decode._counters(device, 3)
    assert decode._counters(device, 4) is small
    large = decode._counters(device, len(small) + 1)
    assert len(large) > len(small)
    assert not large.any()
    assert decode._counters(device, 3) is large


def test_a_recorded_call_has_counters_of_its_own(monkeypatch):
    """What a graph holds is zeroed by the graph and shared with no stream."""
    made = []

    def zeros(count, dtype, device):
        made.append((count, dtype, device.type))
        return torch.empty(count, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(decode.torch, "zeros", zeros)
    kept = dict(decode._arrived)
    one, other = (decode._counters(torch.device("cuda", 0), 5) for _ in range(2))
    assert one is not other
    assert made == [(5, torch.int32, "cuda")] * 2
    assert decode._arrived == kept


def test_each_stream_has_its_own_counters(monkeypatch):
    class Stream:
        cuda_stream = 1

    zeros = torch.zeros
    monkeypatch.setattr(decode, "_arrived", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(decode.torch, "zeros", lambda count, dtype, device: zeros(count))
    device = torch.device("cuda", 0)
    first = decode._counters(device, 5)
    Stream.cuda_stream = 2
    assert decode._counters(device, 5) is not first
    Stream.cuda_stream = 1
    assert decode._counters(device, 5) is first


def test_rows_with_gaps_are_read_in_place():
    checks.gaps()


def test_empty_sizes():
    for M, K, N in ((0, 8, 5), (3, 0, 5), (3, 8, 0)):
        checks.decode("fp32", 4, (M, K, N))


def test_more_rows_than_it_takes_are_refused():
    with pytest.raises(ValueError, match="at most 16 rows, got 17"):
        checks.decode("fp32", 3, (17, 8, 5))


def test_nan_is_not_hidden():
    given = checks.make("fp32", 3, (2, 8, 5))
    given["x"][0, 0] = float("nan")
    for activation in ACTIVATIONS:
        y, t, z = decode.decode(**given, scale=0.7, activation=activation)
        assert all(part[0].isnan().all() and not part[1].isnan().any() for part in (y, t, z))


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.what}")
def test_planted_bug_is_found(mutant):
    assert not triton_mutants.survives(mutant, mutants.run)
