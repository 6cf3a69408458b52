"""Every operator of ours passes opcheck with a sample call; a new one fails until it has one.

What its dtypes, layouts and forms need beyond that is the business of its own test file.
"""

import pytest
import torch

from decomp_kernels.bench import operators

SAMPLES = operators.samples(5, 12, 8, 4)


def test_every_operator_has_a_sample():
    assert operators.registered() == set(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    op = operators.operator(name)
    found = torch.library.opcheck(op, SAMPLES[name])
    assert set(found.values()) == {"SUCCESS"}
    results = op(*SAMPLES[name])
    results = results if isinstance(results, (tuple, list)) else [results]
    flat = [t for r in results for t in (r if isinstance(r, (tuple, list)) else [r])]
    assert any(t.numel() for t in flat) and all(torch.isfinite(t).all() for t in flat)
