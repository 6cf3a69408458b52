"""What kernels/triton/gram.py must compute, against float64; AssertionError where it does not."""

import torch
from triton_checks import DEVICE, SINGLE, kernel, tensor

from decomp_kernels.kernels.aten import gram as aten
from decomp_kernels.reference import gram as reference
from decomp_kernels.testing import assert_as_good_as, relative_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = (1, 3, 16, 24, 64, 200)
# (K, N) of a pair: below one block, off every block, whole blocks, rows of 16 bytes or not.
SHAPES = ((5, 3), (33, 130), (64, 128), (131, 67), (256, 40))


def make(dtype, shapes, padded=False):
    """Downs [r, K] and ups [N, r] for (r, K, N) each; padded: rows with a gap behind them."""

    def draw(rows, cols, seed):
        wide = tensor(rows, cols + 8 * padded, dtype=torch.float64, seed=seed)
        return (wide * 0.3).to(dtype)[:, :cols]

    downs = [draw(r, K, 2 * i) for i, (r, K, _) in enumerate(shapes)]
    ups = [draw(N, r, 2 * i + 1) for i, (r, _, N) in enumerate(shapes)]
    return downs, ups


def gram(downs, ups, kind="o", squared=True, scale=0.7):
    """Loss, residuals and gradients, each beside the composition's and the reference's."""
    d_loss = torch.tensor(1.7, device=DEVICE)
    wide = [[M.double() for M in matrices] for matrices in (downs, ups)]
    found = []
    for implementation, matrices in (
        (kernel("gram"), (downs, ups)), (aten, (downs, ups)), (reference, wide),
    ):  # fmt: skip
        loss, E = implementation.forward(*matrices, kind, squared, scale)
        slope = d_loss.to(loss.dtype)
        grads = implementation.backward(slope, *matrices, E, squared, scale)
        found.append((loss, E, grads))
    (loss, E, grads), (aten_loss, _, aten_grads), (true_loss, _, _) = found
    assert loss.dtype == torch.float32
    assert_as_good_as(loss, aten_loss, true_loss, "loss")
    true_E, true_grads = _by_group(found[2], downs, ups)
    for actual, truth in zip(E, true_E, strict=True):
        assert actual.dtype == torch.float32
        assert actual.is_contiguous()
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) < SINGLE if truth.any() else not actual.any()
    for actual, plain, truth in zip(grads, aten_grads, true_grads, strict=True):
        assert actual.dtype == plain.dtype
        assert_as_good_as(actual, plain, truth, "gradient")


def _by_group(found, downs, ups):
    """The reference's results of float64 copies, grouped as the originals' dtypes group them."""
    _, E, grads = found
    parts = []
    for stacks in (E, grads):
        flat, index = {}, 0
        for name, matrices in (("down", downs), ("up", ups)):
            for group in reference.groups([M.double() for M in matrices]):
                for place, position in enumerate(group):
                    flat[name, position] = stacks[index][place]
                index += 1
        parts.append(
            [
                torch.stack([flat[name, position] for position in group])
                for name, matrices in (("down", downs), ("up", ups))
                for group in reference.groups(matrices)
            ]
        )
    return parts


def cell(dtype, r, number, kind, squared):
    """Two matrices of one shape, of this rank, and one of another shape and rank 2.

    Of the largest rank, which is slow in the interpreter, one small matrix.
    """
    K, N = SHAPES[number % 2 if r == 200 else number % 5]
    other = SHAPES[(number + 2) % 5]
    shapes = [(r, K, N), (2, *other), (r, K, N)][: 1 if r == 200 else 3]
    gram(*make(DTYPES[dtype], shapes, padded=number % 2 == 1), kind, squared)


def mixed(kind, squared):
    """Shapes, ranks and dtypes in no order, in one call."""
    downs, ups = [], []
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32, torch.float16)):
        more = make(dtype, [(3 + number, 20 + 8 * number, 17), (16, 24, 40)])
        downs += more[0]
        ups += more[1]
    gram(downs, ups, kind, squared)


def gaps():
    """Rows that are not neighbours are read in place, and nothing between them is."""
    downs, ups = make(torch.float32, [(5, 70, 33), (20, 21, 70)])

    def apart(M):
        wide = torch.full((M.shape[0] + 1, M.shape[1] + 8), float("nan"), device=DEVICE)
        wide[:-1, :-8] = M
        return wide[:-1, :-8]

    def outcome(downs, ups):
        loss, E = kernel("gram").forward(downs, ups, "o", False, 0.7)
        slope = torch.tensor(1.7, device=DEVICE)
        return loss, *E, *kernel("gram").backward(slope, downs, ups, E, False, 0.7)

    expected = outcome(downs, ups)
    for change in (apart, lambda M: M.T.contiguous().T):
        found = outcome([change(M) for M in downs], [change(M) for M in ups])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def exact_zero():
    """Orthonormal factors: E is 0, and so is every gradient, by the norm too."""
    up = torch.eye(40, 24, device=DEVICE)
    down = up.T.contiguous()
    for squared in (True, False):
        loss, E = kernel("gram").forward([down], [up], "o", squared, 0.7)
        slope = torch.tensor(1.0, device=DEVICE)
        grads = kernel("gram").backward(slope, [down], [up], E, squared, 0.7)
        assert loss == 0
        assert not any(part.any() for part in (*E, *grads))
