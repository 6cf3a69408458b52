"""What the Triton kernels of the weight maps and of merging must compute, against float64.

As triton_checks.py: tests and planted bugs run the same checks, and kernels are imported by the
call.
"""

from contextlib import ExitStack, contextmanager

import torch
from triton_checks import DTYPES, agree, kernel, tensor
from weight_maps import order

from decomp_kernels.factors import BlockRotate, DoubleHadamard, Hadamard, Scatter, SingularDiagonal
from decomp_kernels.reference import block_rotate as block_rotate_definition
from decomp_kernels.reference import double_hadamard as double_hadamard_definition
from decomp_kernels.reference import hadamard as hadamard_definition
from decomp_kernels.reference import scatter as scatter_definition
from decomp_kernels.reference import singular_diagonal as singular_diagonal_definition
from decomp_kernels.reference.decomposed_linear import merged_weight as merged_definition
from decomp_kernels.testing import relative_error

# N, K and tokens: below one block, off every block, whole blocks.
SHAPES = ((5, 7, 3), (33, 70, 37), (70, 35, 9), (32, 64, 64), (41, 70, 18))
# Two float32 operands on a 16-bit base lose the product of their low parts, twice in a row.
SPLIT = 2**-15
SCALE = 0.7


@contextmanager
def walking(name, **changes):
    """Small tiles and few shares: a program of a small test has several.  Further names changed."""
    module = kernel(name)
    chosen, small = module.configuration, {"BLOCK_N": 16, "BLOCK_K": 32, "SHARES": 2}

    def few(*args, **sizes):
        config = chosen(*args, **sizes)
        return config | {size: value for size, value in small.items() if size in config}

    with ExitStack() as back:
        for attribute, value in {"configuration": few, **changes}.items():
            back.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, value)
        yield


def gradients(dense, tensors, W, g, x):
    """Of the floating tensors, by autograd through x dense(W, **tensors)^T in their dtypes."""
    leaves = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    y = x @ dense(W, **leaves).to(x.dtype).T
    return torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], g)


def wide(tensors):
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def both(op, definition, m, exact_m, dense, tensors, W, g, x, precise=True):
    """build and contract of one map, every result as good as eager's."""
    module, single = kernel(op), W.dtype == torch.float32
    built = module.build(m, W)
    assert built.dtype == W.dtype and built.is_contiguous()
    exact = definition.build(exact_m, W.double())
    agree(built, dense(W, **tensors).to(W.dtype), exact, "build", single)

    trained = [name for name, t in tensors.items() if t.is_floating_point()]
    ours = module.contract(m, W, g, x)
    ours = ours if isinstance(ours, tuple) else (ours,)
    plain = gradients(dense, tensors, W, g, x)
    truth = gradients(dense, wide(tensors), W.double(), g.double(), x.double())
    known = dict(zip(trained, zip(plain, truth, strict=True), strict=True))
    wanted = trained if len(ours) == len(trained) else ["diagonal"]
    for name, actual in zip(wanted, ours, strict=True):
        assert actual.dtype == tensors[name].dtype
        agree(actual, *known[name], name, single)
        if precise and actual.dtype == torch.float32:
            assert relative_error(actual, known[name][1]) < SPLIT, name


def rows_of_more(rows, cols, *, dtype, seed):
    """[rows, cols] with other values behind them, for a kernel that does not stop to find."""
    return tensor(rows + 64, cols, dtype=dtype, seed=seed)[:rows]


def sized(dtype, shape):
    """The adapter's dtype, W, g and x."""
    base, adapter = DTYPES[dtype]
    N, K, M = shape
    sizes = ((N, K), (M, N), (M, K))
    made = (rows_of_more(*size, dtype=base, seed=n) for n, size in enumerate(sizes))
    return adapter, *made


def hadamard(dtype, r, shape):
    adapter, W, g, x = sized(dtype, shape)
    N, K, _ = shape
    tensors = {
        "up": tensor(N, r, dtype=adapter, seed=5),
        "down": rows_of_more(r, K, dtype=adapter, seed=6),
    }

    def dense(W, up, down):
        return W * (1 + SCALE * (up @ down))

    m, exact = Hadamard(**tensors, scale=SCALE), Hadamard(**wide(tensors), scale=SCALE)
    both("hadamard", hadamard_definition, m, exact, dense, tensors, W, g, x)


def double_hadamard(dtype, r, shape):
    adapter, W, g, x = sized(dtype, shape)
    N, K, _ = shape
    tensors = {
        "up1": tensor(N, r, dtype=adapter, seed=5),
        "down1": rows_of_more(r, K, dtype=adapter, seed=6),
        "up2": tensor(N, r + 2, dtype=adapter, seed=7),
        "down2": rows_of_more(r + 2, K, dtype=adapter, seed=8),
    }

    def dense(W, up1, down1, up2, down2):
        return W + SCALE * (up1 @ down1) * (up2 @ down2)

    m, exact = (DoubleHadamard(**t, scale=SCALE) for t in (tensors, wide(tensors)))
    both("double_hadamard", double_hadamard_definition, m, exact, dense, tensors, W, g, x)


def singular_diagonal(dtype, k, shape, by_tokens):
    adapter, W, g, x = sized(dtype, shape)
    N, K, M = shape
    assert by_tokens == (M * k * (N + K) <= N * K * (M + k)), "another way to the gradient"
    tensors = {
        "left": tensor(N, k, dtype=adapter, seed=5),
        "diagonal": tensor(k, dtype=torch.float32, seed=6),
        "right": rows_of_more(k, K, dtype=adapter, seed=7),
    }

    def dense(W, left, diagonal, right):
        return W + (left * diagonal).to(left.dtype) @ right

    m, exact = SingularDiagonal(**tensors), SingularDiagonal(**wide(tensors))
    precise = dtype != "bf16" and dtype != "fp16"
    definition = singular_diagonal_definition
    both("singular_diagonal", definition, m, exact, dense, tensors, W, g, x, precise)


def scatter(dtype, count, shape):
    adapter, W, g, x = sized(dtype, shape)
    N, K, _ = shape
    places = order(N * K, torch.Generator().manual_seed(4))[:count]
    tensors = {
        "rows": places // K,
        "cols": places % K,
        "values": tensor(len(places), dtype=adapter, seed=5),
    }

    def dense(W, rows, cols, values):
        return W + torch.zeros_like(W).to(values.dtype).index_put((rows, cols), values)

    m, exact = Scatter(**tensors), Scatter(**wide(tensors))
    both("scatter", scatter_definition, m, exact, dense, tensors, W, g, x)


def block_rotate(dtype, blocks, rows, permuted):
    """forward, build and backward; blocks: (m, q, b)."""
    base, adapter = DTYPES[dtype]
    m, q, b = blocks
    K, module, single = q * b, kernel("block_rotate"), base == torch.float32
    x, gx = (rows_of_more(rows, K, dtype=base, seed=seed) for seed in (0, 1))
    turns = tensor(m, q, b, b, dtype=adapter, seed=2)
    orders = None
    if permuted:
        generator = torch.Generator().manual_seed(3)
        orders = torch.stack([order(K, generator) for _ in range(m)])
        orders = orders.to(x.device)

    def results(module, m, x, gx):
        return module.forward(m, x), module.build(m, x), *module.backward(m, gx, x)

    ours = results(module, BlockRotate(turns, orders), x, gx)
    exact = BlockRotate(turns.double(), orders)
    truth = results(block_rotate_definition, exact, x.double(), gx.double())
    # Eager in these dtypes: blocks and rows in the wider of theirs.
    definition = BlockRotate(turns.to(adapter), orders)
    plain = results(_Eager(adapter), definition, x.to(adapter), gx.to(adapter))
    for name, *values in zip(("x R", "W R^T", "blocks", "dx"), ours, plain, truth, strict=True):
        wanted = adapter if name == "blocks" else base
        assert values[0].dtype == wanted and values[0].is_contiguous(), name
        agree(values[0], values[1].to(wanted), values[2], name, single)
        if values[0].dtype == torch.float32:
            assert relative_error(values[0], values[2]) < SPLIT, name


class _Eager:
    """R in plain PyTorch in the dtypes of its operands: one rounding a factor."""

    def __init__(self, dtype):
        self.dtype = dtype

    def forward(self, m, x):
        for j in range(len(m.blocks)):
            x = self._turned(m, j, x, m.blocks[j])
        return x

    def build(self, m, weight):
        for j in reversed(range(len(m.blocks))):
            weight = self._turned(m, j, weight, m.blocks[j].mT)
        return weight

    def backward(self, m, gx, x):
        blocks, x = m.blocks.detach().requires_grad_(), x.detach().requires_grad_()
        turned = self.forward(BlockRotate(blocks, m.permutations), x)
        return torch.autograd.grad(turned, (blocks, x), gx)

    def _turned(self, m, j, t, blocks):
        order = None if m.permutations is None else m.permutations[j]
        return block_rotate_definition.rotate(t, blocks, order).to(self.dtype)


def merged_weight(dtype, r, shape, scaled):
    """One rounding of the float64 result, element by element, but for float32 noise."""
    base, adapter = DTYPES[dtype]
    N, K, _ = shape
    W = tensor(N, K, dtype=base, seed=0)
    branch = [None, None, None]
    if r:
        branch = [
            rows_of_more(r, K, dtype=adapter, seed=1),
            tensor(N, r, dtype=adapter, seed=2),
            tensor(r, dtype=torch.float32, seed=3),
        ]
    scales = [tensor(size, dtype=torch.float32, seed=4) if scaled else None for size in (K, N)]
    out = kernel("merged_weight").merged_weight(W, *branch, *scales, SCALE)
    given = [None if t is None else t.double() for t in (*branch, *scales)]
    exact = merged_definition(W.double(), *given, SCALE)
    assert out.dtype == base and out.is_contiguous()
    if base == torch.float32:
        agree(out, None, exact, "merged", single=True)
    nearest = (exact.to(base).double() - exact).abs()
    noise = 2**-22 * merged_definition(
        W.double().abs(), *(None if t is None else t.abs() for t in given), SCALE
    )
    assert ((out.double() - exact).abs() <= nearest + noise).all()
