"""The operators on quantised weights: those on the dense weight, which nobody keeps."""

import pytest
import torch
from quantized_weights import FORMATS, by_definition, random_weight
from torch import nn

import decomp_kernels as dk
from decomp_kernels import native_library
from decomp_kernels.bench import engine, memory
from decomp_kernels.ops import decomposed_linear as operator
from decomp_kernels.ops import frozen_matmul as frozen
from decomp_kernels.ops import row_norm as norms
from decomp_kernels.ops import tiled_weight
from decomp_kernels.ops.row_norm import row_norm, squared_rows
from decomp_kernels.testing import assert_as_good_as, relative_error

# Blocks of 64: within a row, spanning rows, and with a last block that is not whole.
SHAPES = [(48, 192), (70, 200), (33, 34)]
NATIVE = ["native:passes"] if native_library.why_not_loaded() is None else []


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_weight, "TILE_ELEMENTS", 1024)


@pytest.fixture
def tiles(monkeypatch):
    """The shapes of the tiles that are made."""
    made = []
    whole = tiled_weight.TiledWeight._tile

    def counted(self, codes, absmax, rows, cols, dtype):
        made.append((rows, cols))
        return whole(self, codes, absmax, rows, cols, dtype)

    monkeypatch.setattr(tiled_weight.TiledWeight, "_tile", counted)
    return made


def terms(N, K, dtype, adapter=None, r=3, tokens=(2, 9)):
    def leaf(*shape, kind=dtype):
        return (torch.randn(*shape, dtype=torch.float64) / 4).to(kind).requires_grad_()

    small = adapter or dtype
    scales = torch.promote_types(dtype, torch.float32)
    return {
        "x": leaf(*tokens, K), "bias": leaf(N, kind=scales),
        "down": leaf(r, K, kind=small), "up": leaf(N, r, kind=small), "core": leaf(r, kind=scales),
        "in_scale": leaf(K, kind=scales), "out_scale": leaf(N, kind=scales),
        "addend": leaf(*tokens, N),
    }  # fmt: skip


def results(weight, given, names, **options):
    """y and the gradients of every term in ``names``."""
    some = {name: given[name] for name in names}
    y = dk.decomposed_linear(some.pop("x"), weight, some.pop("bias", None), **some, **options)
    torch.manual_seed(5)
    dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    return dict(
        zip(("y", *names), (y, *torch.autograd.grad(y, [given[n] for n in names], dy)), strict=True)
    )


CALLS = [
    (("x",), {}),
    (("x", "bias", "down", "up"), {"scale": 1.7}),
    (("x", "down", "up", "core", "addend", "in_scale"), {"activation": "gelu"}),
    (("x", "bias", "down", "up", "out_scale"), {"dropout": 0.3, "seed": torch.tensor(11)}),
    (("x", "in_scale", "out_scale"), {}),
]


@pytest.mark.parametrize("impl", ["reference", "aten"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_the_operator_on_the_dense_weight(kind, shape, impl, tiles):
    weight = random_weight(kind, *shape, torch.float64)
    dense = by_definition(weight)
    for names, options in CALLS:
        given = terms(*shape, torch.float64)
        ours = results(weight, given, names, impl=impl, **options)
        exact = results(dense, given, names, impl="reference", **options)
        for name in exact:
            assert relative_error(ours[name], exact[name]) < 1e-12, (name, names)
    several = [tile for tile in tiles if tile != shape]
    assert bool(several) == (impl == "aten")


@pytest.mark.parametrize("impl", ["aten", *NATIVE, "auto"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"),
                                    ("bfloat16", "bfloat16")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("kind", FORMATS)
def test_low_precision_is_as_good_as_torch_on_the_dense_weight(kind, dtypes, impl):
    base, adapter = (getattr(torch, name) for name in dtypes)
    shape = (70, 200)
    weight = random_weight(kind, *shape, base)
    for names, options in CALLS[:2]:
        given = terms(*shape, base, adapter)
        wide = {n: t.detach().double().requires_grad_() for n, t in given.items()}
        ours = results(weight, given, names, impl=impl, **options)
        exact = results(by_definition(weight), wide, names, impl="reference", **options)
        x = given["x"]
        y = nn.functional.linear(x, by_definition(weight, base))
        if "down" in names:
            branch = (x.to(adapter) @ given["down"].T) @ given["up"].T
            y = (y + options["scale"] * branch + given["bias"]).to(base)
        torch.manual_seed(5)
        dy = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
        eager = (y, *torch.autograd.grad(y, [given[n] for n in names], dy))
        for name, plain in zip(exact, eager, strict=True):
            assert_as_good_as(ours[name], plain, exact[name], name, dtype=base)


def test_tiles_with_the_scales_of_others_are_seen(monkeypatch):
    """Negative controls of the above, where blocks span rows."""
    weight, x = random_weight("nf4", 70, 200, torch.float64), torch.randn(4, 200).double()
    exact = x @ by_definition(weight).T
    assert relative_error(dk.decomposed_linear(x, weight), exact) < 1e-12
    whole = tiled_weight.TiledWeight._tile
    with monkeypatch.context() as patch:
        patch.setattr(
            tiled_weight.TiledWeight, "_tile",
            lambda self, codes, absmax, *others: whole(self, codes, absmax.roll(1), *others),
        )  # fmt: skip
        assert relative_error(dk.decomposed_linear(x, weight), exact) > 0.1
    monkeypatch.setattr(tiled_weight, "gcd", lambda block, K: block)  # rows that begin in a block
    with pytest.raises(AssertionError):
        dk.decomposed_linear(x, weight)


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_any_block_size(block):
    weight = random_weight("nf4", 40, 192, torch.float64, block)
    given = terms(40, 192, torch.float64)
    ours = results(weight, given, ("x", "down", "up"))
    for name, exact in results(by_definition(weight), given, ("x", "down", "up")).items():
        assert relative_error(ours[name], exact) < 1e-12


@pytest.mark.parametrize("kind", FORMATS)
def test_norms_and_frozen_products(kind):
    for shape in SHAPES:
        weight = random_weight(kind, *shape, torch.float64)
        dense, given = by_definition(weight), terms(*shape, torch.float64)
        down, up = given["down"], given["up"]
        exact = (dense + 0.7 * up @ down).norm(dim=1)
        ours = row_norm(weight, down, up, 0.7)
        assert relative_error(squared_rows(weight), dense.square().sum(1)) < 1e-12
        product = frozen.frozen_matmul(weight, down.T)
        pairs = [
            (ours, exact),
            (product, dense @ down.T),
            *zip(torch.autograd.grad(ours.sum(), (down, up)),
                 torch.autograd.grad(exact.sum(), (down, up)), strict=True),
            *zip(torch.autograd.grad(product.square().sum(), down),
                 torch.autograd.grad((dense @ down.T).square().sum(), down), strict=True),
        ]  # fmt: skip
        for made, right in pairs:
            assert relative_error(made, right) < 1e-12


def pair_of_layers(method, weight_format):
    """An adapted QuantizedLinear and the same on its dense weight, with equal moved adapters."""
    linear = nn.Linear(64, 48).double()
    own = nn.Sequential(dk.QuantizedLinear.from_linear(linear, weight_format))
    plain = nn.Sequential(own[0].dequantize())
    for model in (own, plain):
        torch.manual_seed(1)
        dk.adapt(model, method, ["0"])
    adapters = own[0].adapters["default"], plain[0].adapters["default"]
    for (name, tensor), (_, other) in zip(
        *(a.state_dict(keep_vars=True).items() for a in adapters), strict=True
    ):
        assert relative_error(tensor, other) < 1e-10, name  # a start from W: PiSSA, SVDiff, ...
    for mine, other in zip(*(a.parameters() for a in adapters), strict=True):
        if mine.requires_grad:
            mine.data += torch.randn_like(mine) / 10
            other.data.copy_(mine.data)
    for mine, other in zip(*(a.buffers() for a in adapters), strict=True):
        other.copy_(mine)
    return own[0], plain[0]


@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
@pytest.mark.parametrize("name", sorted(dk.methods()))
def test_every_method_computes_what_it_does_on_the_dense_weight(name, weight_format):
    method = dk.methods()[name].small()
    own, plain = pair_of_layers(method, weight_format)
    x = torch.randn(7, 64, dtype=torch.float64)
    outs, grads = [], []
    for layer in (own, plain):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = layer(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        outs.append(y)
        grads.append([leaf.grad, *(p.grad for p in layer.adapters.parameters() if p.requires_grad)])
    assert relative_error(own(x), nn.functional.linear(x, plain.weight, plain.bias)) > 1e-4
    assert relative_error(*outs) < 1e-12
    assert len(grads[0]) == len(grads[1]) > 1
    for mine, right in zip(*grads, strict=True):
        assert relative_error(mine, right) < 1e-12
    if method.why_not_mergeable is None:
        for mine, right in zip(own.merged_values(), plain.merged_values(), strict=True):
            assert relative_error(mine, right) < 1e-12


@pytest.mark.parametrize("weight_format", ["nf4", "int8"])
@pytest.mark.parametrize("method", [dk.LoRA(r=4), dk.DoRA(r=4), dk.SSL(), dk.SSB(), dk.IA3(),
                                    dk.HRA(r=4), dk.OFT(block_size=32)],
                         ids=lambda method: method.name)  # fmt: skip
def test_no_dense_weight_is_kept_or_made_whole(method, weight_format, monkeypatch):
    N = K = 512
    tokens = 16
    model = nn.Sequential(
        dk.QuantizedLinear.from_linear(nn.Linear(K, N, bias=False), weight_format)
    )
    layer = dk.adapt(model, method, ["0"])[0]
    x, dy = torch.randn(tokens, K), torch.randn(tokens, N)
    step = engine.layer("step", layer, x, dy)
    exist = [*layer.parameters(), *layer.buffers()]
    small = 4 * (3 * tokens * (N + K) + 64 * (N + K))  # activations, and what is of rank r
    assert memory.saved_bytes(step, exist) <= small
    assert memory.peak_bytes(step, x.device) <= small + 4 * N * K // 2
    # The same with one tile for all of W, as a control.
    monkeypatch.setattr(tiled_weight, "TILE_ELEMENTS", N * K)
    assert memory.peak_bytes(step, x.device) >= 4 * N * K


def test_dora_finds_its_norm_once_an_optimizer_step(monkeypatch):
    calls = []
    whole = norms.frozen_matmul
    monkeypatch.setattr(norms, "frozen_matmul", lambda *a: calls.append(1) or whole(*a))

    def after(cache_norm):
        torch.manual_seed(0)
        model = nn.Sequential(dk.QuantizedLinear.from_linear(nn.Linear(64, 32), "nf4"))
        dk.adapt(model, dk.DoRA(r=2, cache_norm=cache_norm), ["0"])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        calls.clear()
        x, outs = torch.randn(5, 64), []
        for _ in range(3):
            for _ in range(4):  # accumulated gradients
                outs.append(model(x))
                outs[-1].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(calls), torch.stack(outs)

    kept, outs = after(None)
    anew, exact = after(False)
    assert (kept, anew) == (3, 12)
    assert torch.equal(outs, exact)
    assert not torch.equal(outs[3], outs[4])
    assert after(True)[0] == 3
    dense = nn.Sequential(nn.Linear(8, 4))
    layer = dk.adapt(dense, dk.DoRA(r=2), ["0"])[0]
    layer(torch.randn(2, 8))
    assert layer.adapters["default"].kept_norm is None  # on a dense base it is found each time


def test_other_codes_make_another_norm():
    layer = dk.QuantizedLinear.from_linear(nn.Linear(64, 32), "nf4")
    model = dk.adapt(nn.Sequential(layer), dk.DoRA(r=2), ["0"])
    x = torch.randn(3, 64)
    before = model(x)
    other = dk.QuantizedLinear.from_linear(nn.Linear(64, 32), "nf4")
    model.load_state_dict({**model.state_dict(), "0.weight": other.weight,
                           "0.weight_scale": other.weight_scale})  # fmt: skip
    dense = by_definition(model[0].base_weight(), torch.float32)
    right = nn.functional.linear(x, dense * (model[0].adapters["default"].magnitude
                                             / dense.norm(dim=1))[:, None], layer.bias)  # fmt: skip
    assert relative_error(model(x), right) < 1e-6
    assert relative_error(model(x), before) > 0.1


@pytest.mark.parametrize("kind", FORMATS)
def test_it_compiles_whole(kind):
    weight = random_weight(kind, 70, 200, torch.float32)
    given = terms(70, 200, torch.float32)
    for names, options in CALLS[1:4]:

        def run(x, *others, names=names, options=options):
            named = dict(zip(names[1:], others, strict=True))
            return dk.decomposed_linear(x, weight, named.pop("bias", None), **named, **options)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaves = [given[name] for name in names]
        pairs = [(f(*leaves), torch.autograd.grad(f(*leaves).sum(), leaves))
                 for f in (compiled, run)]  # fmt: skip
        torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)


def test_a_compiled_dora_follows_the_optimizer():
    model = nn.Sequential(dk.QuantizedLinear.from_linear(nn.Linear(64, 32), "nf4"))
    dk.adapt(model, dk.DoRA(r=2), ["0"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    x = torch.randn(5, 64)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", FORMATS)
def test_registration(kind):
    weight = random_weight(kind, 24, 64, torch.float32)
    absmax = tiled_weight.tiled(weight, "aten").absmax
    parts = (weight.codes, absmax, weight.format)
    given = {n: t.detach() for n, t in terms(24, 64, torch.float32, tokens=(5,)).items()}
    others = (given["bias"], given["down"], given["up"], None, None, given["out_scale"])
    options = (None, 1.0, 0.0, "identity")
    torch.library.opcheck(
        operator.fwd, (given["x"], *parts, *others, None, *options, [True, True], "aten")
    )
    y, t, z = operator.fwd(given["x"], *parts, *others, None, *options, [True, True], "aten")
    needs = [True, False, *([True] * 3), False, False, True, False]
    torch.library.opcheck(
        operator.bwd, (y, given["x"], *parts, *others, t, z, *options, needs, "aten")
    )
    right = given["down"].T.contiguous()
    torch.library.opcheck(frozen.fwd, (*parts, right))
    torch.library.opcheck(frozen.bwd, (*parts, torch.randn(24, 3)))


def test_autocast_multiplies_in_its_dtype():
    weight = random_weight("nf4", 48, 192, torch.bfloat16)
    given = terms(48, 192, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dk.decomposed_linear(given["x"], weight, down=given["down"], up=given["up"])
    assert y.dtype == torch.bfloat16
    low = [given[name].detach().bfloat16() for name in ("x", "down", "up")]
    torch.testing.assert_close(y, dk.decomposed_linear(low[0], weight, down=low[1], up=low[2]))
    grads = torch.autograd.grad(y.sum(), (given["x"], given["down"]))
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)


def test_several_linears_of_one_x():
    x = torch.randn(4, 64)
    layers = [{"weight": random_weight(kind, 24, 64, torch.float32)} for kind in FORMATS]
    layers.append({"weight": torch.randn(8, 64)})
    for y, layer in zip(dk.decomposed_linears(x, layers), layers, strict=True):
        assert torch.equal(y, dk.decomposed_linear(x, **layer))


def test_explain_knows_what_can_run():
    model = nn.Sequential(dk.QuantizedLinear.from_linear(nn.Linear(64, 32), "nf4"))
    dk.adapt(model, dk.LoRA(r=2), ["0"])
    text = str(dk.explain(model[0], tokens=32))
    assert "aten" in text or "native:passes" in text


@pytest.mark.parametrize("impl", ["triton:passes", "triton:fused", "native:fused"])
def test_forms_without_quantised_weights_refuse(impl, monkeypatch):
    weight, x = random_weight("nf4", 24, 64, torch.float32), torch.randn(2, 64)
    with pytest.raises(RuntimeError, match=f"{impl}.*cannot run on a quantised weight"):
        dk.decomposed_linear(x, weight, impl=impl)
    model = nn.Sequential(dk.QuantizedLinear(weight))
    with pytest.raises(ValueError, match=f"{impl}.*quantised weight of 0"):
        dk.adapt(model, dk.LoRA(r=2, impl=impl), ["0"])
    assert type(model[0]) is dk.QuantizedLinear
    monkeypatch.setenv("DECOMP_KERNELS_IMPL", impl)
    with pytest.raises(RuntimeError, match="cannot run on a quantised weight"):
        dk.decomposed_linear(x, weight)


def test_what_does_not_fit_is_said():
    x, codes = torch.randn(2, 64), torch.zeros(24, 32, dtype=torch.uint8)

    def weight(codes=codes, scale=None, weight_format="nf4"):
        scale = torch.ones(24) if scale is None else scale
        return dk.QuantizedWeight(codes, scale, weight_format, torch.float32)

    for wrong, error, message in [
        (weight(scale=torch.ones(5)), ValueError, "one absmax for each block"),
        (weight(scale=torch.ones(24).half()), TypeError, "must be float32, got torch.float16"),
        (weight(codes=codes.flatten()), ValueError, r"codes must be \[N, K\]"),
        (weight(codes=codes.char()), TypeError, "must be torch.uint8 for nf4"),
        (weight(weight_format="fp4"), ValueError, "must be one of nf4, int8, got 'fp4'"),
        (weight(codes=codes.char(), weight_format="int8", scale=torch.ones(3)), ValueError,
         "K = 32|int8 of shape"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            dk.decomposed_linear(x if "int8" not in message else x[:, :32], wrong)
    with pytest.raises(ValueError, match="K = 64 columns"):
        dk.decomposed_linear(torch.randn(2, 63), weight())
