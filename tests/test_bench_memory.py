"""Peak and saved bytes of steps whose answer is known by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decomp_kernels import native_library
from decomp_kernels.bench import engine, memory
from decomp_kernels.kernels import mask
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.dropout import counter_dropout, draw_seed

CPU = torch.device("cpu")
M, K, N, R = 32, 48, 64, 4


def of(function, *, saved_beside=(), x=None):
    """(peak, saved) bytes of forward + backward of a function of x."""
    x = torch.randn(M, K) if x is None else x

    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    with torch.no_grad():
        dy = torch.randn_like(function(x))
    contender = engine.layer("layer", Layer(), x, dy)
    return memory.peak_bytes(contender, CPU), memory.saved_bytes(contender, saved_beside)


def test_a_frozen_linear_saves_nothing_and_allocates_y_and_dx():
    weight = torch.randn(N, K)
    peak, saved = of(lambda x: F.linear(x, weight), saved_beside=[weight])
    assert saved == 0
    assert peak == 4 * (M * N + M * K)


def test_a_trained_linear_saves_x_and_allocates_dw_too():
    linear = nn.Linear(K, N, bias=False)
    contender = engine.layer("linear", linear, torch.randn(M, K), torch.randn(M, N))
    assert memory.saved_bytes(contender, linear.parameters()) == 4 * M * K
    assert memory.peak_bytes(contender, CPU) == 4 * (M * N + M * K + N * K)


def test_a_weight_that_is_not_excluded_counts_once():
    weight = torch.randn(N, K)
    _, saved = of(lambda x: F.linear(F.linear(x, weight), weight.T))
    assert saved == 4 * N * K


def test_relu_saves_its_output():
    assert of(torch.relu) == (4 * 2 * M * K, 4 * M * K)


def test_what_autograd_lets_go_before_backward_is_not_saved():
    def scaled(x):
        x.square().exp()  # nothing holds it, and its graph is gone at once
        return torch.relu(x)

    peak, saved = of(scaled)
    assert saved == 4 * M * K  # relu's output
    assert peak > saved


def test_dropout_saves_its_mask():
    peak, saved = of(lambda x: F.dropout(x, 0.5))
    assert saved >= M * K  # a byte an element, or the scaled mask in x's dtype
    assert peak >= saved + 4 * M * K


def test_a_temporary_is_in_the_peak_and_not_in_what_is_saved():
    def wasteful(x):
        torch.empty(10 * M * K)
        return torch.relu(x)

    assert of(wasteful) == (4 * 10 * M * K, 4 * M * K)


def test_a_sparse_tensor_counts_with_its_indices():
    indices, values = torch.tensor([[0, 2, 5], [1, 0, 7]]), torch.randn(3)
    weight = torch.sparse_coo_tensor(
        indices, values, (N, K), is_coalesced=True, check_invariants=True
    )
    _, saved = of(lambda x: torch.sparse.mm(weight, x.T).T)
    assert saved == 8 * 6 + 4 * 3


def lowrank(dtype=torch.float32):
    down, up = torch.randn(R, K), torch.randn(N, R)
    return {name: t.to(dtype).requires_grad_() for name, t in (("down", down), ("up", up))}


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["p=0", "p=0.5"])
def test_lora_saves_x_and_t_and_nothing_else(dropout):
    weight, terms = torch.randn(N, K), lowrank()
    kept = [weight, *terms.values()]
    _, saved = of(
        lambda x: decomposed_linear(x, weight, **terms, dropout=dropout, seed=torch.tensor(3)),
        saved_beside=kept,
    )
    assert saved == 4 * (M * K + M * R) + (8 if dropout else 0)  # the seed, an int64


def test_float32_adapters_keep_a_float32_t():
    weight, terms = torch.randn(N, K).bfloat16(), lowrank()
    x = torch.randn(M, K).bfloat16()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, **terms), saved_beside=[weight, *terms.values()], x=x
    )
    assert saved == 2 * M * K + 4 * M * R


def test_ia3_saves_z():
    weight, scale = torch.randn(N, K), torch.rand(N).requires_grad_()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, out_scale=scale), saved_beside=[weight, scale]
    )
    assert saved == 4 * M * N


def test_ssl_saves_x():
    weight, scale = torch.randn(N, K), torch.rand(K).requires_grad_()
    _, saved = of(
        lambda x: decomposed_linear(x, weight, in_scale=scale), saved_beside=[weight, scale]
    )
    assert saved == 4 * M * K


def test_a_mask_is_drawn_in_blocks_not_for_the_whole_of_x():
    """Two words a block, and three lanes of 16 bits more are far from as large as x here."""
    x = torch.randn(4096, 1024)
    seed = draw_seed(x)
    peak, saved = of(lambda x: counter_dropout(x, 0.1, seed), saved_beside=[seed], x=x)
    block = mask.BLOCK_ELEMENTS
    assert block * 8 <= x.nbytes // 8  # else this shows nothing
    y_and_dx = 2 * x.nbytes
    assert saved == 0 and y_and_dx < peak <= y_and_dx + 8 * block


@pytest.mark.parametrize("node", [True, False], ids=["in one call", "by the interpreter"])
def test_a_float32_bias_on_a_bf16_layer_makes_no_float32_copy_of_dy(node, monkeypatch):
    if not node:
        monkeypatch.setattr(native_library, "autograd_node", lambda: None)
    weight, x = torch.randn(512, 256).bfloat16(), torch.randn(1024, 256).bfloat16()
    bias = torch.zeros(512, requires_grad=True)
    frozen, _ = of(lambda x: F.linear(x, weight), x=x)
    peak, _ = of(lambda x: decomposed_linear(x, weight, bias, impl="aten"), x=x)
    assert peak <= frozen + 16 * bias.nbytes
