"""The counter mask: against plain integers, its rate, its independence of shape, its memory."""

import pytest
import torch

from decomp_kernels.kernels import gemm, mask
from decomp_kernels.ops.dropout import counter_dropout, draw_seed
from decomp_kernels.reference.dropout import keep_mask, kept_fraction, threshold

MASK64 = (1 << 64) - 1


def lanes_in_plain_integers(seed, count):
    """SplitMix64 as Steele, Lea and Flood print it, in Python's own integers."""
    lanes = []
    for i in range(count):
        z = (seed + (i // 4 + 1) * 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        z = z ^ (z >> 31)
        lanes.append((z >> (16 * (i % 4))) & 0xFFFF)
    return lanes


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_the_mask_is_the_defined_one(seed, p):
    M, K = 7, 13
    expected = torch.tensor(lanes_in_plain_integers(seed, M * K)).view(M, K) >= round(p * 65536)
    assert torch.equal(keep_mask(torch.tensor(seed), (M, K), p), expected)
    assert torch.equal(mask.keep(torch.tensor(seed), slice(0, M), K, p).bool(), expected)
    parts = [
        mask.keep(torch.tensor(seed), rows, K, p)
        for rows in gemm.row_blocks(torch.empty(M, K), 2 * K)
    ]
    assert torch.equal(torch.cat(parts).bool(), expected)


def test_splitmix64_known_answers():
    """The first outputs for seed 0, as published with it (java.util.SplittableRandom)."""
    words = []
    lanes = lanes_in_plain_integers(0, 12)
    for i in range(3):
        words.append(sum(lanes[4 * i + j] << (16 * j) for j in range(4)))
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_keep_rate_is_exact_to_sampling(p):
    kept = keep_mask(torch.tensor(4), (500, 400), p).double()
    sigma = (kept_fraction(p) * (1 - kept_fraction(p)) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - kept_fraction(p)) < 4 * sigma
    neighbours = (kept[:, 1:] - kept.mean()) * (kept[:, :-1] - kept.mean())
    assert abs(neighbours.mean().item()) < 4 * kept.var().item() / neighbours.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_and_its_gradient_use_one_mask(dtype):
    x = torch.randn(3, 5, 9).to(dtype).requires_grad_()
    seed = draw_seed(x)
    y = counter_dropout(x, 0.4, seed)
    kept = keep_mask(seed, (15, 9), 0.4).view(3, 5, 9)
    expected = torch.where(kept, x.detach().double() / kept_fraction(0.4), 0.0)
    assert torch.equal(y != 0, kept & (x != 0))
    assert (y.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, kept)


def test_nothing_is_kept_but_the_seed():
    x = torch.randn(64, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        counter_dropout(x, 0.1)
    assert [t.numel() for t in kept] == [1]


def test_the_seed_follows_torchs_generator():
    x = torch.ones(8, 8)
    torch.manual_seed(1)
    first, second = counter_dropout(x, 0.5), counter_dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(counter_dropout(x, 0.5), first) and not torch.equal(first, second)


def test_registration():
    x = torch.randn(4, 6)
    torch.library.opcheck(
        torch.ops.decomp_kernels.counter_dropout.default, (x, torch.tensor(3), 0.5)
    )


def test_a_rate_below_the_resolution_drops_nothing():
    x = torch.randn(4, 6)
    assert threshold(1e-6) == 0 and counter_dropout(x, 1e-6) is x
