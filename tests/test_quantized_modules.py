"""Adapted linears of bitsandbytes, of torchao and our own: reading, computing, merging, files."""

import copy
import pickle
import warnings

import pytest
import torch
from quantized_weights import by_definition
from torch import nn
from torch.nn import functional as F

import decomp_kernels as dk
from decomp_kernels.ops.quantize import quantize_weight
from decomp_kernels.ops.tiled_weight import dense
from decomp_kernels.quantized import quantized_weight, why_not_quantized
from decomp_kernels.reference.dequantize import LEVELS
from decomp_kernels.testing import assert_as_good_as, relative_error

N, K = 64, 128


def plain(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(K, N).to(dtype)


def four_bit(cls="Linear4bit", linear=None, **options):
    bnb = pytest.importorskip("bitsandbytes")
    linear = linear or plain()
    options = ({"quant_type": "nf4"} if cls == "Linear4bit" else {}) | options
    module = getattr(bnb.nn, cls)(linear.in_features, linear.out_features, **options).bfloat16()
    module.load_state_dict(linear.state_dict())
    return module.to("cpu")


def eight_bit(linear=None, **options):
    bnb = pytest.importorskip("bitsandbytes")
    linear = linear or plain()
    module = bnb.nn.Linear8bitLt(K, N, **({"has_fp16_weights": False} | options)).bfloat16()
    module.load_state_dict(linear.state_dict())
    return module.to("cpu")


def torchao(linear=None, config="Int8WeightOnlyConfig", **options):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(linear or plain())
    options = {"set_inductor_config": False} | options
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model[0]


KINDS = {
    "bitsandbytes nf4 nested": lambda linear=None: four_bit(linear=linear),
    "bitsandbytes nf4": lambda linear=None: four_bit(linear=linear, compress_statistics=False),
    "bitsandbytes LinearNF4": lambda linear=None: four_bit("LinearNF4", linear=linear),
    "bitsandbytes nf4 stored as bf16": lambda linear=None: four_bit(
        linear=linear, quant_storage=torch.bfloat16
    ),
    "bitsandbytes int8": eight_bit,
    "torchao int8": torchao,
    "our nf4": lambda linear=None: dk.QuantizedLinear.from_linear(linear or plain(), "nf4"),
    "our int8": lambda linear=None: dk.QuantizedLinear.from_linear(linear or plain(), "int8"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, method=None, linear=None):
    """A model of one adapted layer whose adapter moves the output."""
    model = nn.Sequential(KINDS[kind](linear))
    dk.adapt(model, method or dk.LoRA(r=4), ["0"])
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) / 8
    return model


@kinds
def test_what_is_read_is_what_the_library_dequantises(kind):
    module = KINDS[kind]()
    weight = quantized_weight(module)
    assert weight.shape == (N, K)
    ours = dense(weight, torch.float32)
    match kind.split()[0], kind.split()[1]:
        case "bitsandbytes", "int8":
            theirs = module.weight.data.float() * (module.weight.SCB / 127)[:, None]
            module(torch.randn(2, K).bfloat16())  # which moves codes and scales elsewhere
            assert torch.equal(dense(quantized_weight(module), torch.float32), ours)
        case "bitsandbytes", _:
            import bitsandbytes as bnb

            state = copy.deepcopy(module.weight.quant_state)
            state.dtype = torch.float32
            theirs = bnb.functional.dequantize_4bit(module.weight.data, state)
        case "torchao", _:
            theirs = module.weight.dequantize(torch.float32)
        case _:
            theirs = module.dequantize().weight.float()
            ours = ours.bfloat16().float()
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    linear_error = relative_error(ours, plain().weight)
    assert linear_error < (0.12 if weight.format == "nf4" else 0.01)
    assert why_not_quantized(module) is None


@pytest.mark.parametrize("method", [dk.LoRA(r=4), dk.DoRA(r=4), dk.SSL(), dk.SSB(), dk.IA3()],
                         ids=lambda method: method.name)  # fmt: skip
@kinds
def test_forward_and_backward_are_those_of_the_dense_layer(kind, method):
    layer = adapted(kind, method)[0]
    weight = by_definition(layer.base_weight())
    x = torch.randn(3, 5, K).bfloat16()
    dy = torch.randn(3, 5, N).bfloat16()

    def results(module, kind):
        leaf = x.to(kind).requires_grad_()
        y = module(leaf)
        trained = [p for p in module.adapters.parameters() if p.requires_grad]
        return y, *torch.autograd.grad(y, [leaf, *trained], dy.to(kind))

    def on(dtype, adapter_dtype):
        linear = nn.Linear(K, N)
        linear.weight, linear.bias = nn.Parameter(weight.to(dtype)), layer.bias
        model = dk.adapt(nn.Sequential(linear.to(dtype)), method, ["0"])
        model[0].adapters.load_state_dict(layer.adapters.state_dict())
        return model.to(adapter_dtype)[0] if adapter_dtype == dtype else model[0]

    exact = results(on(torch.float64, torch.float64), torch.float64)
    eager = results(on(torch.bfloat16, torch.float32), torch.bfloat16)
    plain_y = F.linear(x.double(), weight, layer.bias.double())
    assert relative_error(exact[0], plain_y) > 0.05
    for number, (mine, low, right) in enumerate(
        zip(results(layer, torch.bfloat16), eager, exact, strict=True)
    ):
        assert_as_good_as(mine, low, right, f"result {number}", dtype=torch.bfloat16)


@kinds
def test_merging_is_refused_or_quantises_anew_with_its_error(kind):
    model = adapted(kind, dk.DoRA(r=4))
    layer, x = model[0], torch.randn(6, K).bfloat16()
    before = copy.deepcopy(model.state_dict())
    parts = layer.base_weight().tensors()
    y = model(x)
    with pytest.raises(ValueError, match="0 has a quantised weight.*requantize=True"):
        dk.merge(model)
    assert layer.merged_adapter is None and torch.equal(model(x), y)
    merged = layer.merged_values()[0].float()
    dk.merge(model, requantize=True)
    made = dense(layer.base_weight(), torch.float32)
    error = relative_error(made, merged)
    nf4 = layer.base_weight().format == "nf4"
    assert 0.05 < error < 0.15 if nf4 else 0.002 < error < 0.02
    assert layer.requantization_error == pytest.approx(error, rel=1e-4)
    state = getattr(layer, "quant_state", None)  # from which bitsandbytes repairs a lost weight's
    assert state is getattr(layer.weight, "quant_state", None)
    assert f"quantised anew with relative error {error:.3g}" in dk.report(model)
    assert relative_error(model(x), F.linear(x.double(), made.double(), layer.bias.double())) < 0.01
    assert relative_error(model(x), y) < (0.2 if nf4 else 0.02)
    dk.unmerge(model)
    assert all(map(torch.equal, layer.base_weight().tensors(), parts))
    assert torch.equal(model(x), y) and layer.requantization_error is None
    assert before.keys() == model.state_dict().keys()
    dk.merge(model, keep_base=False, requantize=True)
    with pytest.raises(RuntimeError, match="was not kept"):
        dk.unmerge(model)
    dk.remove(model)
    assert type(model[0]) is type(KINDS[kind]())
    assert relative_error(dense(quantized_weight(model[0]), torch.float32), merged) == error


def test_a_merge_that_fails_changes_no_layer():
    model = nn.Sequential(KINDS["our nf4"](), nn.ReLU(), nn.Linear(N, N))
    dk.adapt(model, dk.LoRA(r=2), ["0", "2"])
    with torch.no_grad():
        model[2].adapters["default"].up.fill_(torch.inf)
    parts = model[0].base_weight().tensors()
    with pytest.raises(ValueError, match="NaN or infinity"):
        dk.merge(model, requantize=True)
    assert all(map(torch.equal, model[0].base_weight().tensors(), parts))
    assert model[0].merged_adapter is None


@kinds
def test_copies_files_and_the_way_back(kind, tmp_path):
    model, x = adapted(kind, dk.DoRA(r=4)), torch.randn(6, K).bfloat16()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    if kind != "torchao int8":  # whose modules torchao itself makes impossible to pickle
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with dk.disable(model):
        base = model(x)
    assert torch.equal(base, KINDS[kind]()(x)) and not torch.equal(base, y)
    dk.save_adapter(model, tmp_path)
    fresh = nn.Sequential(KINDS[kind]())
    dk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), y)
    other = nn.Sequential(KINDS[kind](plain(seed=1)))
    with pytest.raises(dk.AdapterFileError, match="other values"):
        dk.load_adapter(other, tmp_path)
    with pytest.raises(dk.AdapterFileError, match="it was a|its weight was"):
        dk.load_adapter(nn.Sequential(plain()), tmp_path)
    dk.remove(model)
    assert type(model[0]) is type(KINDS[kind]()) and torch.equal(model(x), base)


@pytest.mark.parametrize("kind", ["our nf4", "our int8"])
@pytest.mark.parametrize("part", ["weight", "weight_scale", "bias"])
def test_one_other_code_scale_or_bias_is_another_base(kind, part, tmp_path):
    dk.save_adapter(adapted(kind), tmp_path)
    fresh = nn.Sequential(KINDS[kind]())
    with torch.no_grad():
        getattr(fresh[0], part).view(-1)[5] += 1
    with pytest.raises(dk.AdapterFileError, match="other values"):
        dk.load_adapter(fresh, tmp_path)


@kinds
def test_what_was_merged_is_saved_with_its_base(kind, tmp_path):
    model, x = adapted(kind), torch.randn(6, K).bfloat16()
    y = model(x)
    dk.merge(model, requantize=True)
    dk.save_adapter(model, tmp_path)
    fresh = nn.Sequential(KINDS[kind]())
    dk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), y)


def test_what_cannot_be_used_is_reported_and_the_rest_adapted():
    bnb = pytest.importorskip("bitsandbytes")
    ao = pytest.importorskip("torchao.quantization")
    odd = nn.Linear(33, N, bias=False).bfloat16()
    modules = {
        "good": four_bit(),
        "fp4": (four_bit(quant_type="fp4"), "quant_type is fp4"),
        "raw4": (bnb.nn.Linear4bit(K, N, quant_type="nf4"), "not quantised yet"),
        "raw8": (bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False), "not quantised yet"),
        "fp16": (bnb.nn.Linear8bitLt(K, N), "has_fp16_weights"),
        "odd": (four_bit(linear=odd, bias=False), "in_features are odd, 33"),
        "groups": (torchao(granularity=ao.PerGroup(32)), "only PerRow"),
        "dynamic": (torchao(config="Int8DynamicActivationInt8WeightConfig"), "its input too"),
    }
    model = nn.ModuleDict({n: m[0] if isinstance(m, tuple) else m for n, m in modules.items()})
    with pytest.warns(UserWarning, match="not adapted"):
        dk.adapt(model, dk.LoRA(r=2))
    report = dict(line.split(": ", 1) for line in dk.report(model).splitlines())
    assert "LoRA" in report.pop("good")
    for name, line in report.items():
        assert modules[name][1] in line, (name, line)
    assert len(report) == len(modules) - 1


@kinds
def test_a_quantised_module_is_not_trained_whole(kind):
    model = nn.Sequential(KINDS[kind](), plain())
    with pytest.raises(ValueError, match="names 0, whose weight is quantised"):
        dk.adapt(model, dk.LoRA(r=2), ["1"], modules_to_save=["0"])
    assert dk.report(model) == "nothing is adapted"


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_a_weight_that_lost_its_scales_is_told_apart(kind):
    model = adapted(kind)
    model[0].weight = nn.Parameter(model[0].weight.data, requires_grad=False)  # as fully_shard has
    with pytest.raises(RuntimeError, match="its scales are lost; fully_shard does this"):
        model(torch.randn(3, K))


def test_bitsandbytes_does_not_pack_an_adapted_weight_for_inference():
    model, x = adapted("bitsandbytes nf4 nested").eval(), torch.randn(2, K).bfloat16()
    parts = [t.clone() for t in model[0].base_weight().tensors()]
    packs = KINDS["bitsandbytes nf4 nested"]().eval()
    with torch.no_grad(), dk.disable(model):
        model(x), packs(x)
    assert all(map(torch.equal, model[0].base_weight().tensors(), parts))
    if getattr(packs.weight.quant_state, "packing_format_for_cpu", False):  # where the CPU has it
        assert "packed its weight" in why_not_quantized(packs)
        assert model[0].support_avx512bf16_for_cpu is False
    dk.remove(model)
    assert model[0].support_avx512bf16_for_cpu == packs.support_avx512bf16_for_cpu


@pytest.mark.parametrize("kind", ["bitsandbytes nf4 nested", "bitsandbytes int8"])
def test_it_computes_what_peft_does(kind):
    peft = pytest.importorskip("peft")
    model, base = adapted(kind, dk.LoRA(r=4, alpha=8)), nn.Sequential(KINDS[kind]())
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = "nf4" in kind, "int8" in kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        theirs = peft.get_peft_model(base, config).base_model.model[0]
    own = model[0].adapters["default"]
    theirs.lora_A["default"].weight.data.copy_(own.down)
    theirs.lora_B["default"].weight.data.copy_(own.up)
    x, grads = torch.randn(5, K), []
    for module, adapter in ((model[0], own), (theirs, None)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        trained = [own.down, own.up] if adapter is not None else [
            theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]  # fmt: skip
        grads.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *trained])))
    for name, mine, other in zip(("y", "x", "down", "up"), *grads, strict=True):
        # In backward bitsandbytes rounds a 4-bit W to the dtype that it was quantised from.
        limit = 2e-3 if (name, "nf4" in kind) == ("x", True) else 1e-5
        assert relative_error(mine, other) < limit, name


def test_the_model_can_be_converted():
    model, x = adapted("our nf4"), torch.randn(3, K)
    scale = model[0].weight_scale
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert model[0].weight_scale.dtype == torch.float32
        assert torch.equal(model[0].weight_scale, scale)
        assert model[0].base_weight().dtype == dtype and model[0].bias.dtype == dtype
        assert model(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(dk.methods()))
def test_every_method_can_be_converted_where_the_base_keeps_its_dtype(name, dtype):
    method = dk.methods()[name].small()
    model, x = adapted("bitsandbytes int8", method, plain(torch.float32)), torch.randn(3, K)
    model.eval()
    right = model(x)
    assert relative_error(model(x.to(dtype)), right) < 0.03  # float32 adapters under 16 bit inputs
    model.to(dtype)
    assert relative_error(model(x.to(dtype)), right) < 0.03
    model(x.to(dtype)).sum().backward()
    if method.why_not_mergeable is None:
        weight, bias = model[0].merged_values()
        assert relative_error(F.linear(x, weight.float(), bias.float()), right) < 0.03


def test_nf4_takes_the_nearest_level_and_int8_the_nearest_step():
    weight = torch.randn(12, 96)
    weight[3] = 0
    made = quantize_weight(weight, "nf4", block_size=32)
    blocks = weight.double().view(-1, 32)
    absmax = blocks.abs().amax(1)
    assert torch.equal(made.scale.double(), absmax)
    candidates = torch.tensor(LEVELS).double() * absmax[:, None, None]
    nearest = (blocks[..., None] - candidates).abs().amin(-1)
    ours = (by_definition(made).view(-1, 32) - blocks).abs()
    torch.testing.assert_close(ours, nearest, rtol=0, atol=1e-6)
    made = quantize_weight(weight, "int8")
    step = weight.double().abs().amax(1) / 127
    assert ((by_definition(made) - weight).abs() <= step[:, None] * 0.500001).all()
    assert not by_definition(made)[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (40, 200)], ids=str)
def test_codes_are_those_of_bitsandbytes_bit_for_bit(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape).to(dtype)
    for block in (64, 256):
        if weight.numel() % block:
            continue
        codes, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        made = quantize_weight(weight, "nf4", block_size=block)
        assert torch.equal(made.codes.flatten(), codes.flatten())
        assert torch.equal(made.scale, state.absmax)
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    made = quantize_weight(weight.half(), "int8")
    assert torch.equal(made.codes, codes) and torch.equal(made.scale, scale)


def test_large_weights_are_quantised_in_blocks_of_rows(monkeypatch):
    weight = torch.randn(70, 200)
    whole = [quantize_weight(weight, kind).tensors() for kind in ("nf4", "int8")]
    monkeypatch.setattr("decomp_kernels.ops.quantize._ELEMENTS", 900)
    for kind, parts in zip(("nf4", "int8"), whole, strict=True):
        assert all(map(torch.equal, quantize_weight(weight, kind).tensors(), parts))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.odd = plain(), None, nn.Linear(33, 4)
        self.again = self.first
        self.head = nn.Linear(N, 10)

    def get_output_embeddings(self):
        return self.head


def test_quantize_a_model():
    model = Model()
    linear, x = model.first, torch.randn(3, K).bfloat16()
    with pytest.warns(UserWarning, match="odd: its in_features are odd, 33"):
        assert dk.quantize(model, "nf4") is model
    assert type(model.head) is nn.Linear and type(model.odd) is nn.Linear
    assert type(model.first) is dk.QuantizedLinear and model.again is model.first
    assert model.first.bias is linear.bias and not linear.bias.requires_grad
    exact = F.linear(
        x.double(), by_definition(model.first.quantized_weight()), linear.bias.double()
    )
    eager = model.first.dequantize()(x)
    assert_as_good_as(model.first(x), eager, exact, "y")
    assert not torch.equal(model.first(x), linear(x))
    fresh = Model()
    with pytest.warns(UserWarning, match="not quantised"):
        dk.quantize(fresh, "nf4")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.first(x), model.first(x))


def test_a_block_can_be_larger_than_the_weight():
    weight = torch.randn(5, 50)
    made = quantize_weight(weight, "nf4", block_size=1 << 40)
    assert made.scale.tolist() == [weight.abs().max()]
    assert torch.equal(made.codes, quantize_weight(weight, "nf4", block_size=256).codes)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_dense_values_are_not_loaded_as_codes(strict, adapted):
    dense_state = {name: t.clone() for name, t in nn.Sequential(plain()).state_dict().items()}
    model = dk.quantize(nn.Sequential(plain()), "int8", ["0"])
    if adapted:
        dk.adapt(model, dk.LoRA(r=2), ["0"])
    before, x = model[0].weight.clone(), torch.randn(3, K).bfloat16()
    y = model(x)
    with pytest.raises(RuntimeError, match=r"0\.weight must be torch.int8, the codes of int8, got"):
        model.load_state_dict(dense_state, strict=strict)
    assert torch.equal(model[0].weight, before) and torch.equal(model(x), y)


@pytest.mark.parametrize("removed", [False, True])
def test_an_encoder_layer_calls_its_quantised_linears_in_evaluation(removed):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)
    dk.quantize(model, "int8", ["linear1", "linear2"])
    if removed:
        dk.remove(dk.adapt(model, dk.LoRA(r=2), ["linear1"]))
    model.eval()
    x = torch.randn(2, 3, 32)
    with torch.no_grad():  # the library call is for inference
        y = model(x)
    assert relative_error(y, model(x.requires_grad_())) < 1e-6


def test_quantize_says_what_is_wrong_and_changes_nothing():
    model = nn.Sequential(plain(), plain())
    model[1].weight.data[0, 0] = torch.nan
    for options, error, message in [
        ({"weight_format": "fp8"}, ValueError, "one of nf4, int8, got 'fp8'"),
        ({"block_size": 48}, ValueError, "power of two, 32 or more, got 48"),
        ({"block_size": "64"}, ValueError, "power of two, 32 or more, got '64'"),
        ({"weight_format": "int8", "block_size": 64}, ValueError, "leave block_size out"),
        ({}, ValueError, "weight of 1 must be loaded and finite"),
        ({"target_modules": ["9"]}, ValueError, "matches no module"),
    ]:
        with pytest.raises(error, match=message):
            dk.quantize(model, **options)
        assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    dk.adapt(model, dk.LoRA(r=2), ["0"])
    with pytest.raises(ValueError, match="adapted already: quantise first"):
        dk.quantize(model, target_modules=["0"])
    with pytest.raises(TypeError, match="plain nn.Linear"):
        dk.QuantizedLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(TypeError, match="floating point matrix"):
        quantize_weight(torch.zeros(3), "nf4")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loaded_quantised_trains(bits, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if bits == 4 else {}
    quantized = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, device_map="cpu"
    ).train()
    dk.adapt(model, dk.DoRA(r=4))
    adapters = [layer for layer in model.modules() if hasattr(layer, "base_weight")]
    assert len(adapters) == 14 and type(model.lm_head) is nn.Linear
    assert all(quantized_weight(layer) is not None for layer in adapters)
    model.gradient_checkpointing_enable()
    ids = torch.randint(0, 50, (2, 12))
    optimizer = torch.optim.AdamW(dk.param_groups(model, lr=1e-2))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    moved = dict(model.named_parameters())
    assert all(not torch.equal(moved[name], before) for name, before in trained.items())
