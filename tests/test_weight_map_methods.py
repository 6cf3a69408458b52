"""LieRA to LoKr: each method against its W' written out densely in float64, and what is its own.

Every parameter is first moved away from the start, where most mistakes are invisible.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decomp_kernels import DecomposedLinear, adapt, methods
from decomp_kernels.methods.base import Adapter, Base
from decomp_kernels.methods.boft import butterfly
from decomp_kernels.methods.diff_pruning import fix_masks, l0_penalty, mask, sampled_mask
from decomp_kernels.methods.oft import cayley, cayley_neumann, nearest_divisor, skew
from decomp_kernels.testing import assert_as_good_as, relative_error

M = methods()
ROTATED = [(12, 24), (24, 12)]  # (N, K): K with many divisors
ANY = [(12, 20), (20, 12), (7, 33)]


def skew_of(row, b):
    """Q with the strict upper triangle filled row by row."""
    Q = torch.zeros(b, b, dtype=row.dtype)
    for value, (i, j) in zip(row, itertools.combinations(range(b), 2), strict=True):
        Q = Q + value * (unit(i, j, b) - unit(j, i, b)).to(row.dtype)
    return Q


def unit(i, j, b):
    return F.one_hot(torch.tensor(i * b + j), b * b).view(b, b)


def rotation(Q, terms=None):
    """Exact with terms=None, by an inverse; else the powers summed one by one."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    if terms is None:
        return (eye - Q) @ torch.linalg.inv(eye + Q)
    power = torch.linalg.matrix_power
    return eye + sum((2 if i < terms - 1 else 1) * power(Q, i) for i in range(1, terms))


def liera(scale):
    return lambda a, W: W + W * (scale * a.up @ a.down)


def loha(scale):
    def dense(a, W):
        return W + scale * torch.einsum("ja,ak,jb,bk->jk", a.up1, a.down1, a.up2, a.down2)

    return dense


def oft(b, terms=5):
    def dense(a, W):
        blocks = [rotation(skew_of(row, b), terms) for row in a.rotation]
        blocks = blocks * (W.shape[1] // b) if len(blocks) == 1 else blocks
        return W @ torch.block_diag(*blocks).T

    return dense


def boft(a, W):
    """R = R_m ... R_1; R_i mixes columns whose half-block numbers differ by 2^(i-1)."""
    m, _, b, _ = a.rotation.shape
    K = W.shape[1]
    R = torch.eye(K, dtype=W.dtype)
    for i in range(m):
        P = permutation(K, b, 2**i).to(W.dtype) if m > 1 else torch.eye(K, dtype=W.dtype)
        blocks = [rotation((D - D.T) / 2) for D in a.rotation[i]]
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    return a.out_scale[:, None] * (W @ R.T)


def permutation(K, b, apart):
    """Column n of P is the unit vector of the column of x that the blocks take as their n-th."""
    taken, half = [], b // 2
    for block in range(0, K // half, 2 * apart):
        for h in range(block, block + apart):
            for start in (h * half, (h + apart) * half):
                taken += range(start, start + half)
    return F.one_hot(torch.tensor(taken), K).T


def hra(a, W):
    """One reflection after the other."""
    for u in a.down:
        W = W - 2 * torch.outer(W @ u, u) / (u @ u)
    return W


def hra_orthonormal(a, W):
    Q = torch.linalg.qr(a.down.T)[0]
    return W - 2 * W @ Q @ Q.T


def sam_parser(a, W):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U @ torch.diag(S + a.delta) @ Vt


def svdiff(a, W):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return U @ torch.diag(F.relu(S + a.delta)) @ Vt


def sparse(a, W):
    for row, col, value in zip(a.rows, a.cols, a.values, strict=True):
        place = torch.zeros_like(W)
        place[row, col] = 1
        W = W + value * place
    return W


def diff_pruning(a, W):
    z = (torch.sigmoid(a.log_alpha) * 3 - 1.5).clamp(0, 1)
    return W + z * a.delta


def lokr(scale):
    def dense(a, W):
        C = a.left if hasattr(a, "left") else a.left_up @ a.left_down
        D = a.right if hasattr(a, "right") else a.right_up @ a.right_down
        return W + scale * torch.einsum("ij,kl->ikjl", C, D).reshape(W.shape)

    return dense


CASES = {
    "liera": (M["liera"](r=4, alpha=6.0), liera(1.5), ANY),
    "hira": (M["hira"](r=4), liera(1.0), ANY),
    "loha, a branch": (M["loha"](r=3, alpha=6.0), loha(2.0), ANY),
    "loha, a weight": (M["loha"](r=9, alpha=6.0), loha(6 / 9), ANY),
    "oft": (M["oft"](block_size=4), oft(4), ROTATED),
    "oft, r": (M["oft"](r=2), lambda a, W: oft(W.shape[1] // 2)(a, W), ROTATED),
    "oft, default size": (M["oft"](), lambda a, W: oft(W.shape[1])(a, W), [(12, 20), (5, 23)]),
    "oft, shared": (M["oft"](block_size=4, block_share=True), oft(4), ROTATED),
    "oft, exact": (M["oft"](block_size=4, use_cayley_neumann=False), oft(4, None), ROTATED),
    "oft, 7 terms": (M["oft"](block_size=4, num_cayley_neumann_terms=7), oft(4, 7), ROTATED),
    "boft": (M["boft"](), boft, ROTATED),
    "boft, 2 factors": (M["boft"](block_size=6, n_butterfly_factor=2), boft, ROTATED),
    "boft, 3 factors": (M["boft"](block_size=2, n_butterfly_factor=3), boft, [(9, 24), (5, 8)]),
    "boft, 4 factors": (M["boft"](block_num=8, n_butterfly_factor=4), boft, [(9, 16), (5, 32)]),
    "hra": (M["hra"](r=4), hra, ANY),
    "hra, odd": (M["hra"](r=5), hra, ANY),
    "hra, orthonormal": (M["hra"](r=4, apply_GS=True), hra_orthonormal, ANY),
    "sam_parser": (M["sam_parser"](), sam_parser, ANY),
    "svdiff": (M["svdiff"](), svdiff, ANY),
    "sparse": (M["sparse"](density=0.1), sparse, ANY),
    "sparse, magnitude": (M["sparse"](r=2, mask="magnitude"), sparse, ANY),
    "diff_pruning": (M["diff_pruning"](alpha_init=0.4), diff_pruning, ANY),
    "lokr": (M["lokr"](r=8, alpha=12.0), lokr(1.5), ANY),
    "lokr, small r": (M["lokr"](r=2, alpha=3.0), lokr(1.5), [(30, 42), (20, 12)]),
    "lokr, both": (M["lokr"](r=1, decompose_both=True), lokr(8.0), [(20, 42), (36, 12)]),
    "lokr, factor": (M["lokr"](r=2, decompose_factor=4), lokr(4.0), [(12, 20), (20, 12)]),
}
PAIRS = [
    pytest.param(name, shape, id=f"{name}-{shape}")
    for name, (_, _, shapes) in CASES.items()
    for shape in shapes
]
every_case = pytest.mark.parametrize(("name", "shape"), PAIRS)
impls = pytest.mark.parametrize("impl", ["reference", "aten"])


def make(method, shape, dtype=torch.float64, adapter_dtype=None, bias=True, seed=0):
    """(adapter, base) at the start."""
    N, K = shape
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(N, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    base = Base(W, b, dtype if adapter_dtype is None else adapter_dtype)
    method.check_shape(N, K, "layer")
    adapter = Adapter(method)
    with torch.no_grad():
        method.create(adapter, base)
    return adapter, base


def perturbed(adapter, size=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p += (size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return adapter


def run(adapter, base, x, training=False):
    return adapter.method.forward(adapter, base, x, training)


def outcome(y, x, adapter, dy):
    leaves = {"x": x, **dict(adapter.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def change(base, x, y):
    plain = F.linear(x, base.weight, base.bias)
    return relative_error(y, plain)


@every_case
@impls
def test_is_its_dense_weight(name, shape, impl):
    method, dense, _ = CASES[name]
    adapter, base = make(replace(method, impl=impl), shape)
    perturbed(adapter)
    for tokens in (2, 60):  # fewer and more than the singular values
        x = torch.randn(tokens, shape[1], dtype=torch.float64, requires_grad=True)
        y, expected = run(adapter, base, x), F.linear(x, dense(adapter, base.weight), base.bias)
        assert change(base, x, y) > 1e-2
        dy = torch.randn_like(y)
        ours, truth = outcome(y, x, adapter, dy), outcome(expected, x, adapter, dy)
        for leaf, value in ours.items():
            assert relative_error(value, truth[leaf]) < 1e-11, leaf


@every_case
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=["fp32", "bf16", "bf16-fp32", "fp16-fp32"],
)
def test_is_as_good_as_eager(name, shape, dtype, adapter_dtype):
    """W' made in float32 or wider by the dense formula, rounded to W's dtype, and a GEMM on it."""
    method, dense, _ = CASES[name]
    adapter, base = make(method, shape, dtype, adapter_dtype)
    perturbed(adapter, size=0.1)
    wide, exact = copy.deepcopy(adapter).to(torch.float32), copy.deepcopy(adapter).double()
    x = torch.randn(48, shape[1]).to(dtype).requires_grad_()
    x64, x_plain = x.detach().double().requires_grad_(), x.detach().clone().requires_grad_()
    if name.startswith(("sam_parser", "svdiff")):  # their U and V are rounded; W' is of those
        dense = rebuilt
    y = run(adapter, base, x)
    plain = F.linear(x_plain, dense(wide, base.weight.float()).to(dtype), base.bias)
    truth = F.linear(x64, dense(exact, base.weight.double()), base.bias.double())
    dy = torch.randn_like(y)
    ours = outcome(y, x, adapter, dy)
    eager = outcome(plain, x_plain, wide, dy)
    right = outcome(truth, x64, exact, dy.double())
    coarsest = dtype if adapter_dtype == torch.float32 else adapter_dtype
    for leaf, value in ours.items():
        assert_as_good_as(value, eager[leaf], right[leaf], leaf, coarsest)


def rebuilt(a, W):
    delta = a.delta
    if "singular_values" in dict(a.named_buffers()):
        delta = F.relu(a.singular_values + delta) - a.singular_values
    return W + a.left @ torch.diag(delta) @ a.right


@every_case
def test_starts_as_the_linear(name, shape):
    method = CASES[name][0]
    for dtype in (torch.float64, torch.float32):
        adapter, base = make(method, shape, dtype)
        x = torch.randn(16, shape[1], dtype=dtype)
        y, plain = run(adapter, base, x), F.linear(x, base.weight, base.bias)
        if method.identity_at_start:
            bound = 0.0 if name.startswith(("lie", "hi", "oft", "sp", "diff")) else 1e-14
            assert relative_error(y, plain) <= max(bound, 8 * torch.finfo(dtype).eps)
        else:
            assert name in ("hra, odd", "hra, orthonormal")
            assert relative_error(y, plain) > 0.1


@every_case
def test_merges(name, shape):
    method, dense, _ = CASES[name]
    for bias in (True, False):
        adapter, base = make(method, shape, bias=bias)
        perturbed(adapter)
        weight, merged_bias = method.merged(adapter, base)
        assert (merged_bias is None) == (not bias)
        assert relative_error(weight, dense(adapter, base.weight)) < 1e-12
        x = torch.randn(5, shape[1], dtype=torch.float64)
        assert relative_error(F.linear(x, weight, merged_bias), run(adapter, base, x)) < 1e-12
    adapter, base = make(method, shape, torch.bfloat16, torch.float32)
    perturbed(adapter)
    weight, _ = method.merged(adapter, base)
    exact, _ = method.merged(
        copy.deepcopy(adapter).double(), base._replace(weight=base.weight.double())
    )
    assert weight.dtype == torch.bfloat16
    nearest = exact.bfloat16().double()
    assert (weight.double() - exact).norm() <= 1.01 * (nearest - exact).norm()


@every_case
def test_shapes_can_be_made_before_there_are_values(name, shape):
    method = CASES[name][0]
    meta = Base(torch.empty(shape, device="meta"), None, torch.float32)
    made = Adapter(method)
    method.create(made, meta)
    real, _ = make(method, shape, torch.float32)
    assert {n: (t.shape, t.dtype) for n, t in made.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in real.state_dict().items()
    }
    assert all(t.device.type == "meta" for t in made.state_dict().values())


# One method at a time: what the dense formula does not say.


def test_loha_routes_agree():
    small, base = make(M["loha"](r=8), (12, 20))
    perturbed(small)
    assert small.method.lower(small, base).weight_map is None
    assert small.method.lower(small, base).down.shape == (64, 20)
    large, base = make(M["loha"](r=9), (12, 20))
    assert large.method.lower(large, base).down is None


def test_oft_sizes():
    OFT = M["oft"]
    assert OFT(r=3).sizes(24) == (3, 8) and OFT(block_size=3).sizes(24) == (8, 3)
    assert OFT().sizes(768) == (24, 32) and OFT().sizes(24) == (1, 24)
    assert OFT().sizes(90) == (3, 30) and nearest_divisor(96, 20) == 16
    assert OFT(oft_block_size=4) == OFT(block_size=4)
    for options, message in [
        ({"r": 2, "block_size": 2}, "give r or block_size, not both"),
        ({"block_size": 1}, "block_size must be at least 2, got 1"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms must be at least 2"),
        ({"eps": 0.0}, "eps must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            OFT(**options)
    for options, message in [
        ({"r": 5}, "r must divide in_features = 24 of layer, got 5; the nearest divisor is 4"),
        ({"block_size": 7}, "block_size must divide in_features = 24 .*nearest divisor is 6"),
        ({"r": 24}, "at least 2 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(OFT(**options), (12, 24))


def test_oft_branches_turn_in_opposite_directions():
    Q = skew(0.05 * torch.randn(3, 6, dtype=torch.float64), 4)
    exact, polynomial = cayley(Q), cayley_neumann(Q, 5)
    eye = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert relative_error(exact @ exact.mT, eye) < 1e-14
    assert relative_error(polynomial, exact.mT) < 1e-3 < 0.1 < relative_error(polynomial, exact)


@pytest.mark.parametrize("shape", [(3, 5), (2, 8), (1, 2)])
def test_the_polynomial_s_gradient_is_autograd_s_through_its_powers(shape):
    q, b = shape
    triangle = torch.randn(q, b * (b - 1) // 2, dtype=torch.float64, requires_grad=True)
    Q = skew(triangle, b)
    powers = torch.eye(b, dtype=Q.dtype) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    ours = cayley_neumann(skew(triangle, b), 5)
    torch.testing.assert_close(ours, powers)
    d_R = torch.randn_like(powers)
    for one, other in zip(*(torch.autograd.grad(R, triangle, d_R) for R in (ours, powers))):
        torch.testing.assert_close(one, other)


def test_coft_keeps_the_rotation_small():
    adapter, base = make(M["oft"](block_size=4, coft=True, eps=0.2), (12, 24))
    perturbed(adapter)
    with torch.no_grad():
        adapter.rotation[0] *= 1e-3
    before = adapter.rotation.detach().clone()
    x = torch.randn(3, 24, dtype=torch.float64)
    y = run(adapter, base, x)
    norms = skew(adapter.rotation.detach(), 4).norm(dim=(1, 2))
    radius = 0.2 / 6**0.5
    assert torch.equal(adapter.rotation[0], before[0]) and norms[0] < radius / 10
    torch.testing.assert_close(norms[1:], torch.full_like(norms[1:], radius))
    assert relative_error(run(adapter, base, x), y) < 1e-14
    assert torch.autograd.grad(y.sum(), adapter.rotation)[0].norm() > 0


def test_boft_mixes_all_columns_with_enough_factors():
    """b 2^(m-1) = K: every input reaches every output of x R, and no fewer factors do it."""
    for m, full in ((2, False), (3, True)):
        adapter, base = make(M["boft"](block_size=4, n_butterfly_factor=m), (16, 16))
        perturbed(adapter)
        R = adapter.method.merged(adapter, base._replace(weight=torch.eye(16).double()))[0]
        assert bool((R.abs() > 1e-9).all()) == full


def test_boft_sizes():
    BOFT = M["boft"]
    assert BOFT(boft_block_num=3, boft_n_butterfly_factor=1).sizes(24) == (3, 8)
    assert torch.equal(butterfly(8, 4, 1, torch.device("cpu")), torch.arange(8)[None])
    with pytest.raises(ValueError, match="give block_size or block_num, not both"):
        BOFT(block_size=4, block_num=2)
    with pytest.raises(ValueError, match="n_butterfly_factor must be at least 1, got 0"):
        BOFT(n_butterfly_factor=0)
    for options, message in [
        ({"block_size": 5}, "must divide in_features = 24 of layer"),
        (
            {"block_size": 3, "n_butterfly_factor": 2},
            "needs an even block size.* 8 blocks of size 3",
        ),
        ({"block_size": 8, "n_butterfly_factor": 2}, "dividing in_features = 24"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(BOFT(**options), (12, 24))


def test_hra_says_whether_it_starts_as_the_identity():
    HRA = M["hra"]
    assert HRA.identity_at_start and HRA(r=6).identity_at_start
    assert not HRA(r=5).identity_at_start and not HRA(r=4, apply_GS=True).identity_at_start
    assert replace(HRA(r=5), r=4).identity_at_start
    adapter, _ = make(HRA(r=5), (12, 20))
    assert torch.equal(adapter.down[0], adapter.down[1])
    assert not torch.equal(adapter.down[3], adapter.down[4])
    with pytest.raises(ValueError, match="r must be at most in_features = 3"):
        make(HRA(r=4, apply_GS=True), (12, 3))


def test_hra_is_orthogonal_and_does_not_depend_on_lengths():
    adapter, base = make(M["hra"](r=6), (20, 20))
    perturbed(adapter)
    H = adapter.method.merged(adapter, base._replace(weight=torch.eye(20).double()))[0]
    assert relative_error(H @ H.T, torch.eye(20).double()) < 1e-13
    x = torch.randn(3, 20, dtype=torch.float64)
    y = run(adapter, base, x)
    with torch.no_grad():
        adapter.down *= torch.tensor([1.0, 2.0, 0.1, 7.0, 1.0, 30.0]).double()[:, None]
    assert relative_error(run(adapter, base, x), y) < 1e-13


def test_hra_keeps_no_float32_copy_of_the_weight():
    adapter, base = make(M["hra"](r=4), (64, 48), torch.bfloat16, torch.float32)
    perturbed(adapter)
    x = torch.randn(8, 48).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(adapter, base, x)
    y.float().sum().backward()
    others = [t for t in kept if t.data_ptr() != base.weight.data_ptr()]
    assert len(others) < len(kept) and max(t.numel() for t in others) < 64 * 48 // 4
    assert adapter.down.grad.norm() > 0


@pytest.mark.parametrize("name", ["sam_parser", "svdiff"])
def test_singular_vectors_move_and_are_saved(name):
    layer = DecomposedLinear(nn.Linear(12, 9), M[name]())
    kept = {k for k in layer.state_dict() if k.startswith("adapters.default.")}
    assert {f"adapters.default.{n}" for n in ("left", "right", "delta")} <= kept
    layer.to(torch.float64)
    adapter = layer.adapters["default"]
    assert adapter.left.dtype == adapter.right.dtype == adapter.delta.dtype == torch.float64
    again = DecomposedLinear(nn.Linear(12, 9, dtype=torch.float64), M[name]())
    with torch.no_grad():
        adapter.delta += 0.5
    again.load_state_dict(layer.state_dict())
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(again(x), layer(x)) and not torch.equal(
        layer(x), F.linear(x, layer.weight, layer.bias)
    )


def test_svdiff_stops_at_zero():
    adapter, base = make(M["svdiff"](), (12, 20))
    with torch.no_grad():
        adapter.delta[3] = -2 * adapter.singular_values[3]
        adapter.delta[4] = 0.5
    x = torch.randn(40, 20, dtype=torch.float64)
    y = run(adapter, base, x)
    grad = torch.autograd.grad(y.square().sum(), adapter.delta)[0]
    assert grad[3] == 0 and (grad[[0, 4]] != 0).all()
    weight = adapter.method.merged(adapter, base)[0]
    values = torch.linalg.svdvals(weight)
    assert values[-1] < 1e-13 * values[0] and values[-2] > 1e-3


def test_sparse_places():
    Sparse = M["sparse"]
    random, base = make(Sparse(density=0.25), (12, 20))
    places = set(zip(random.rows.tolist(), random.cols.tolist(), strict=True))
    assert len(places) == 60 and random.values.shape == (60,)
    torch.manual_seed(7)
    first, _ = make(Sparse(r=2), (12, 20))
    torch.manual_seed(7)
    second, _ = make(Sparse(r=2), (12, 20))
    assert first.values.shape == (64,) and torch.equal(first.cols, second.cols)
    top, base = make(Sparse(density=0.1, mask="magnitude"), (12, 20))
    chosen = base.weight.abs()[top.rows, top.cols]
    assert torch.equal(chosen.sort().values, base.weight.abs().flatten().sort().values[-24:])
    assert make(Sparse(), (12, 20))[0].values.shape == (2,)
    assert make(Sparse(), (2, 3))[0].values.shape == (1,)
    for options, message in [
        ({"density": 0.1, "r": 2}, "give one of them"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"mask": "fisher"}, "mask must be one of random, magnitude, got 'fisher'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sparse(**options)
    with pytest.raises(ValueError, match=r"r = 8 asks for 256 entries of layer.* = 240; lower r"):
        make(Sparse(r=8), (12, 20))


def test_sparse_with_given_places():
    adapter, base = make(M["sparse"](density=3 / 240), (12, 20))
    place, shape = adapter.method.set_mask, (12, 20)
    rows, cols = torch.tensor([11, 0, 5]), torch.tensor([19, 2, 5])
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    parameter = adapter.values
    place(adapter, shape, rows, cols, values)
    weight = adapter.method.merged(adapter, base)[0]
    expected = base.weight.clone()
    expected[11, 19] += 1.0
    expected[0, 2] += 2.0
    expected[5, 5] += 3.0
    assert adapter.values is parameter and torch.equal(weight, expected)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    for arguments, message in [
        ((rows[:2], cols[:2]), r"for each of the 3 values, got \(2,\)"),
        ((rows + 1, cols), r"rows must be from 0 to 11 for a weight \(12, 20\)"),
        ((rows, cols - 3), "cols must be from 0 to 19"),
        ((rows * 0, cols * 0), "no place twice"),
        ((rows, cols, values[:2]), r"values must have shape \(3,\), got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            place(adapter, shape, *arguments)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    place(adapter, shape, cols % 12, rows)
    assert not adapter.values.any()


def pruned(seed=0):
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    adapt(model, M["diff_pruning"](alpha_init=0.5), "all-linear")
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            for p in layer.adapters["default"].parameters():
                p += torch.randn_like(p)
    return model


def test_diff_pruning_samples_in_training_alone():
    model = pruned().train()
    x = torch.randn(5, 20, dtype=torch.float64)
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    model.eval()
    assert torch.equal(model(x), model(x))
    adapter = model[0].adapters["default"]
    z = torch.stack([sampled_mask(adapter) for _ in range(4000)])
    assert z.min() == 0 and z.max() == 1
    # P(z != 0) is what the penalty counts; four standard errors of 4,000 draws.
    p = torch.sigmoid(adapter.log_alpha)
    error = ((z != 0).double().mean(0) - p).abs()
    assert (error <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-9).double().mean() > 0.99
    assert relative_error(mask(adapter), (3 * p - 1.5).clamp(0, 1)) < 1e-14


def test_diff_prunings_penalty():
    model = pruned()
    alphas = [model[i].adapters["default"].log_alpha for i in (0, 2)]
    expected = sum(torch.sigmoid(a).sum() for a in alphas)
    penalty = l0_penalty(model)
    assert relative_error(penalty, expected) < 1e-14
    ours, truth = torch.autograd.grad(penalty, alphas), torch.autograd.grad(expected, alphas)
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(ours, truth, strict=True))
    optimizer = torch.optim.Adam(alphas, lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        l0_penalty(model).backward()
        optimizer.step()
    assert l0_penalty(model) < 0.2 * expected
    with pytest.raises(ValueError, match="needs a model with Diff pruning adapters"):
        l0_penalty(nn.Linear(3, 3))


def test_diff_pruning_becomes_sparse():
    model = pruned().eval()
    x = torch.randn(5, 20, dtype=torch.float64)
    dense = model(x)
    change = (mask(model[0].adapters["default"]) * model[0].adapters["default"].delta).detach()
    whole = fix_masks(copy.deepcopy(model), density=1.0)
    assert relative_error(whole(x), dense) < 1e-13
    assert fix_masks(model, density=0.1) is model
    adapter = model[0].adapters["default"]
    assert isinstance(adapter.method, M["sparse"]) and adapter.values.shape == (24,)
    kept = torch.zeros_like(change)
    kept[adapter.rows, adapter.cols] = adapter.values.detach()
    threshold = change.abs().flatten().sort().values[-24]
    assert torch.equal(
        kept, torch.where(change.abs() >= threshold, change, torch.zeros_like(change))
    )
    expected = F.linear(x, model[0].weight + kept, model[0].bias)
    assert relative_error(model[0](x), expected) < 1e-13
    model.train()(x).square().sum().backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.adapters.default.values", "2.adapters.default.values"]
    assert all(dict(model.named_parameters())[n].grad.any() for n in trained)


def test_lokr_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="decompose_factor must be at least 1, or -1"):
        M["lokr"](decompose_factor=0)
