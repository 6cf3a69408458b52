"""Adapting whole models and taking them back: which modules, what stays, what is had again."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from snapshots import Snapshot, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import decomp_kernels as dk
from decomp_kernels.linear import Decomposed, adapted_layers
from decomp_kernels.methods.base import METHODS
from decomp_kernels.saved_modules import TrainedCopy

every_method = pytest.mark.parametrize("name", sorted(METHODS))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=40,
                   num_attention_heads=2, max_position_embeddings=16)
    )  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20, dtype=dtype)
        self.middle = nn.Sequential(nn.ReLU(), nn.Linear(20, 16, bias=False, dtype=dtype))
        self.head = nn.Linear(16, 6, dtype=dtype)

    def forward(self, x):
        return self.head(self.middle(self.first(x)))


LAYERS = ["first", "middle.1"]


def inputs(*shape, dtype=None):
    return torch.randn(*(shape or (5, 12)), generator=torch.Generator().manual_seed(7)).to(dtype)


def perturb(model, size=0.2):
    """Move whatever trains, away from the start; LoRA-Dash has its directions then, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((size * noise).to(tensor.dtype))
    for layer in adapted_layers(model).values():
        for adapter in layer.adapters.values():
            if hasattr(adapter.method, "select_directions") and not adapter.selected:
                adapter.method.select_directions(adapter, layer.base())
    return model


def adapted(method=None, dtype=None, targets=LAYERS, **options):
    return perturb(dk.adapt(Net(dtype), method or dk.LoRA(r=3), list(targets), **options))


def quietly(model, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dk.adapt(model, *arguments, **options)


# Which modules


@pytest.mark.parametrize(
    ("make", "targets", "options"),
    [
        (llama, "all-linear", {}),
        (llama, ["q_proj", "v_proj"], {}),
        (llama, {"q_proj", "mlp.up_proj"}, {}),
        (llama, ["layers.1.self_attn.q_proj", "lm_head"], {}),
        (llama, r".*\.(q|k)_proj", {}),
        (llama, r"model\.layers\.\d+\.mlp\..*_proj", {}),
        (llama, "all-linear", {"exclude_modules": ["down_proj", "layers.0.self_attn.k_proj"]}),
        (llama, "all-linear", {"exclude_modules": r".*\.mlp\..*"}),
        (bert, "all-linear", {}),
        (bert, ["query", "dense"], {}),
        (bert, ["dense"], {"exclude_modules": ["output.dense"]}),
        (bert, "all-linear", {"modules_to_save": ["classifier"]}),
        (bert, "all-linear", {"modules_to_save": ["bert.pooler"]}),
        (gpt2, "all-linear", {}),
        (gpt2, ["c_attn"], {}),
        (gpt2, r".*\.c_proj", {}),
    ],
)
def test_names_match_as_in_peft(make, targets, options):
    ours = set(adapted_layers(quietly(make(), dk.LoRA(r=2), targets, **options)))
    config = peft.LoraConfig(r=2, target_modules=targets, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), config)
    assert ours == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    "pattern",
    [{"q_proj": 3}, {"layers.1.mlp.up_proj": 5, "up_proj": 6}, {r"layers\.0\..*": 7},
     {r"model.layers.1.self_attn.v_proj": 4},
     {r".*q_proj": 3, "layers.0.self_attn.q_proj": 5, "up_proj": 4}],
    ids=str,
)  # fmt: skip
def test_ranks_by_pattern_are_those_of_peft(pattern):
    alphas = {key: 2.0 * rank for key, rank in pattern.items()}
    model = dk.adapt(llama(), dk.LoRA(r=2, alpha=4), rank_pattern=pattern, alpha_pattern=alphas)
    ours = {
        name: (layer.adapters["default"].down.shape[0], layer.adapters["default"].method.scale)
        for name, layer in adapted_layers(model).items()
    }
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear",
                             rank_pattern=pattern, alpha_pattern=alphas)  # fmt: skip
    theirs = {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in peft.get_peft_model(llama(), config).named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert ours == theirs
    assert len(set(ours.values())) > 1


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 6))


class Own(nn.Linear):
    """A forward of its own, as quantised linears have."""


class Odd(nn.Module):
    """Every kind of module that matches a name and cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.good = nn.Linear(6, 6)
        self.embedding = nn.Embedding(4, 6)
        self.conv = nn.Conv2d(1, 1, 3)
        self.experts = Experts()
        self.own = Own(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.whole = nn.Linear(6, 6).to(torch.float8_e4m3fn)
        self.empty = nn.Linear(0, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.good.weight


def test_what_matches_and_cannot_be_adapted_is_reported():
    model = Odd()
    model.whole.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    everything = {
        "embedding": "it is a Embedding; only nn.Linear and Conv1D are supported",
        "conv": "it is a Conv2d; only nn.Linear and Conv1D are supported",
        "experts": "it is a Experts; only nn.Linear and Conv1D are supported",
        "own": "it is a Own, not a plain nn.Linear: its forward may not be a linear's",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
        "whole": "its weight is torch.int8, not floating point",
        "empty": "its weight is empty, (6, 0)",
        "tied": "it shares its weight with good, which is adapted",
    }
    with pytest.warns(UserWarning, match="not adapted") as warned:
        dk.adapt(model, dk.LoRA(r=2), ["good", *everything])
    assert set(adapted_layers(model)) == {"good"}
    text = dk.report(model)
    for name, reason in everything.items():
        assert f"{name}: {reason}" in str(warned[0].message)
        assert f"{name}: not adapted, {reason}" in text
    assert "good: default (active) LoRA(" in text


def test_the_output_projection_of_torch_attention_is_never_called():
    """Even a plain nn.Linear in its place would be adapted to no effect."""
    model = nn.Module()
    model.attention = nn.MultiheadAttention(6, 2)
    model.attention.out_proj = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="out_proj matches .*never calls the module"):
        dk.adapt(model, dk.LoRA(r=2), ["out_proj"])


@pytest.mark.parametrize("name", ["lora", "dora", "ssb", "bitfit"])
def test_a_tied_weight_is_adapted_once_and_never_merged_into_the_other(name):
    model = llama(tie_word_embeddings=True)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        base = model(tokens).logits
    perturb(dk.adapt(model, METHODS[name].small(), ["lm_head"]))
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    with torch.no_grad():
        before, kept = model(tokens).logits, embedding.clone()
        dk.merge(model)
        torch.testing.assert_close(model(tokens).logits, before)
        assert same_bits(model.model.embed_tokens.weight, kept)
        dk.unmerge(model)
        assert model.lm_head.weight is embedding
        assert same_bits(dk.remove(model)(tokens).logits, base)


# What stays


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_removing_gives_back_exactly_what_was_there(name, dtype):
    model = Net(dtype).eval()
    before = Snapshot(model, inputs(dtype=dtype))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    perturb(dk.adapt(model, METHODS[name].small(), LAYERS))
    assert not torch.equal(model(before.x), before.output)
    dk.remove(model)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: kind for n, (_, kind, *_) in before.facts[0].items()
    }
    assert not any(p.requires_grad for p in model.parameters())
    for key, parameter in model.named_parameters():  # frozen by adapt; all else as it was
        parameter.requires_grad_(flags[key])
    before.assert_unchanged()
    assert type(model.first) is nn.Linear


@every_method
def test_merging_and_unmerging_is_exact(name):
    if METHODS[name].small().why_not_mergeable is not None:
        assert name in ("parallel_adapter", "series_adapter")
        return
    model = adapted(METHODS[name].small(), torch.bfloat16).eval()
    before = Snapshot(model, inputs(dtype=torch.bfloat16))
    for _ in range(2):
        dk.merge(model)
        assert model.first.merged_adapter == "default"
        assert not same_bits(model.first.weight, before.tensors["first.weight"]) or name == "bitfit"
        dk.merge(model)  # merged already: nothing more happens
        dk.unmerge(model)
        before.assert_unchanged()
    plain = dk.remove(dk.merge(model, keep_base=False))
    assert [type(m) for m in plain.modules()] == [type(m) for m in Net().modules()]
    exact = copy.deepcopy(plain).double()
    for key, parameter in exact.named_parameters():
        parameter.data.copy_(plain.get_parameter(key).data)
    wide = inputs(dtype=torch.bfloat16).double()
    error = (before.output.double() - exact(wide)).abs().max() / exact(wide).abs().max()
    assert error < 8 * torch.finfo(torch.bfloat16).eps


def test_modules_object_names_hooks_and_modes_stay():
    model = Net()
    model.first.eval()
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    model.first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.first.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.first.note = "mine"
    first, weight, bias = model.first, model.first.weight, model.first.bias
    dk.adapt(model, dk.LoRA(r=2), LAYERS)
    assert model.first is first
    assert isinstance(first, nn.Linear)
    assert model.first.weight is weight
    assert model.first.bias is bias
    assert not model.first.training
    assert not model.first.adapters.training
    assert model.middle[1].training
    assert model.middle[1].adapters["default"].training
    model(inputs()).sum().backward()
    dk.remove(model)
    model.requires_grad_()
    model(inputs()).sum().backward()
    assert calls == ["pre", "forward", "backward"] * 2
    assert model.first.note == "mine"


def test_training_and_eval_reach_the_adapter():
    model = adapted(dk.LoRA(r=3, dropout=0.5))
    torch.manual_seed(1)
    assert not torch.equal(model(inputs()), model(inputs()))
    model.eval()
    assert torch.equal(model(inputs()), model(inputs()))
    assert not model.first.adapters["default"].training


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_which_biases_train(bias):
    model = Net()
    model.norm = nn.LayerNorm(6)
    dk.adapt(model, dk.SSB(), ["first"], bias=bias, modules_to_save=["head"])
    perturb(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n}
    copies = {"head.copies.default.weight", "head.copies.default.bias"}
    assert (
        trained - copies
        == {
            "none": set(),
            "lora_only": {"first.bias"},
            "all": {"first.bias", "norm.bias"},
        }[bias]
    )
    assert copies <= trained
    if bias == "none":
        return
    with pytest.raises(ValueError, match="two adapters cannot share"):
        dk.adapt(model, dk.SSB(), ["first"], adapter_name="two")
    again = adapted()
    with pytest.raises(ValueError, match="two adapters cannot share"):
        dk.adapt(again, dk.SSB(), LAYERS, adapter_name="two", bias=bias)


@every_method
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "to"])
def test_converting_after_adapting(name, convert):
    """Converting an adapted model is adapting a converted one, with the same adapter."""
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    dtype = dtype.get(convert, torch.bfloat16)
    model = adapted(METHODS[name].small()).eval()
    exact = copy.deepcopy(model).double()
    converted = model.to(dtype) if convert == "to" else getattr(model, convert)()
    assert {p.dtype for p in converted.parameters()} == {dtype}
    x = inputs(dtype=dtype)
    y = converted(x)
    assert y.dtype == dtype
    error = (y.double() - exact(x.double())).abs().max() / exact(x.double()).abs().max()
    # Weights and adapters were rounded too: a few roundings for each of three layers.
    assert error < (1e-5 if convert == "double" else 40 * torch.finfo(dtype).eps)
    y.float().square().mean().backward()
    grads = [p.grad for p in converted.parameters() if p.requires_grad]
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@every_method
def test_meta_device_then_load_then_initialize(name):
    """A model without values: adapters without values, filled when the weights have come."""
    weights = Net(torch.float64).state_dict()
    for put in ("assign", "to_empty"):
        with torch.device("meta"):
            model = Net(torch.float64)
        dk.adapt(model, METHODS[name].small(), LAYERS)
        assert all(p.is_meta for p in model.parameters())
        with pytest.raises(RuntimeError, match="is on the meta device still; load its weight"):
            dk.initialize(model)
        if put == "assign":
            missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        else:
            model.to_empty(device="cpu")
            missing, unexpected = model.load_state_dict(weights, strict=False)
        assert unexpected == []
        assert all(".adapters." in key for key in missing)
        with pytest.raises(
            RuntimeError, match="made on the meta device .*call decomp_kernels.init"
        ):
            model(inputs(dtype=torch.float64))
        torch.manual_seed(3)
        dk.initialize(model)
        torch.manual_seed(3)
        direct = dk.adapt(Net(torch.float64), METHODS[name].small(), LAYERS).eval()
        model.eval()
        flags = [{n: p.requires_grad for n, p in m.named_parameters() if "adapters" in n}
                 for m in (model, direct)]  # fmt: skip
        assert flags[0] == flags[1]
        x = inputs(dtype=torch.float64)
        torch.testing.assert_close(model(x), Net(torch.float64)(x), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(model(x), direct(x), rtol=1e-12, atol=1e-13)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in direct.named_parameters()]
        before = perturb(model)(x)
        dk.initialize(model)  # nothing waits any more: trained values stay
        assert torch.equal(model(x), before)


WITH_BUTTERFLIES = dk.BOFT(block_size=2, n_butterfly_factor=2)  # has a buffer that is not saved


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
@pytest.mark.parametrize("method", [*sorted(METHODS), WITH_BUTTERFLIES], ids=str)
def test_meta_device_then_a_whole_checkpoint(method, assign):
    """The checkpoint has the adapters too: they are as trained, and initialize keeps them."""
    method = METHODS[method].small() if isinstance(method, str) else method
    trained = adapted(method).eval()
    with torch.device("meta"):
        model = Net()
    dk.adapt(model, method, LAYERS).eval()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict(), assign=assign)
    expected = trained(inputs())
    assert same_bits(model(inputs()), expected)
    assert same_bits(dk.initialize(model)(inputs()), expected)


def test_initializing_several_adapters():
    with torch.device("meta"):
        model = Net()
    dk.adapt(model, dk.VeRA(r=2), LAYERS, adapter_name="one")
    dk.adapt(model, dk.LoRA(r=2), ["first"], adapter_name="two")
    model.load_state_dict(Net().state_dict(), strict=False, assign=True)
    dk.initialize(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"first.adapters.two.down", "first.adapters.two.up"}
    dk.set_adapter(model, "one")
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"core", "up_scale"}
    one, two = (model.get_submodule(layer).adapters["one"] for layer in LAYERS)
    assert one.shared_up is two.shared_up
    torch.testing.assert_close(model(inputs()), Net()(inputs()))


def test_initializing_fails_as_a_whole():
    with torch.device("meta"):
        model = Net()
    dk.adapt(model, dk.PiSSA(r=2), LAYERS)
    weights = Net().state_dict()
    weights["middle.1.weight"][0, 0] = float("nan")
    model.load_state_dict(weights, strict=False, assign=True)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"the weight of middle.1 must be finite .*exclude"):
        dk.initialize(model)
    before.assert_unchanged()


@every_method
def test_copies_and_pickles(name):
    model = adapted(METHODS[name].small(), modules_to_save=["head"]).eval()
    expected = model(inputs())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(clone(inputs()), expected)
        assert [p.requires_grad for p in clone.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]
        perturb(clone)
        assert not torch.equal(clone(inputs()), expected)
        assert type(dk.remove(clone).first) is nn.Linear
    assert same_bits(model(inputs()), expected), "the clone shared a tensor with the original"


@every_method
def test_base_checkpoints_still_load(name):
    model = adapted(METHODS[name].small())
    torch.manual_seed(9)
    other = Net()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == []
    assert all(".adapters.default." in key for key in missing)
    assert same_bits(dk.remove(model)(inputs()), other(inputs()))
    # A whole checkpoint of the adapted model loads strictly.
    source, target = adapted(METHODS[name].small()).eval(), Net()
    dk.adapt(target, METHODS[name].small(), LAYERS).eval()
    target.load_state_dict(source.state_dict())
    assert same_bits(target(inputs()), source(inputs()))


# Several adapters, disabling, modules trained whole


def test_named_adapters():
    model = adapted(dk.LoRA(r=3), adapter_name="one")
    first = model(inputs())
    dk.adapt(model, dk.SSB(), ["first"], adapter_name="two")
    assert model.first.active_adapter == "two"
    assert model.middle[1].active_adapter is None
    assert not torch.equal(model(inputs()), first)
    base = Net()(inputs())
    torch.testing.assert_close(model(inputs()), base)  # SSB at its start
    perturb(model)
    second = model(inputs())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"first.adapters.two.in_scale", "first.adapters.two.out_scale"}
    assert same_bits(dk.set_adapter(model, "one")(inputs()), first)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.adapters.one.{t}" for layer in LAYERS for t in ("down", "up")}
    assert same_bits(dk.set_adapter(model, "two")(inputs()), second)
    dk.merge(model)
    torch.testing.assert_close(model(inputs()), second)
    assert model.middle[1].merged_adapter is None
    dk.unmerge(model)
    assert same_bits(model(inputs()), second)


def test_the_same_name_on_further_layers_is_one_adapter():
    model = adapted(dk.LoRA(r=3))
    before = model(inputs())
    dk.adapt(model, dk.SSB(), ["head"])
    torch.testing.assert_close(model(inputs()), before)
    assert {layer.active_adapter for layer in adapted_layers(model).values()} == {"default"}
    assert {n.split(".adapters")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        *LAYERS, "head",
    }  # fmt: skip


def test_disable():
    model = adapted(dk.DoRA(r=3), modules_to_save=["head"])
    before, base = model(inputs()), Net()(inputs())
    with dk.disable(model) as inside:
        assert inside is model
        assert same_bits(model(inputs()), base)
        with dk.disable(model):
            assert same_bits(model(inputs()), base)
        assert same_bits(model(inputs()), base), "the inner block ended the outer one"
    assert same_bits(model(inputs()), before)
    with pytest.raises(ZeroDivisionError), dk.disable(model):
        raise ZeroDivisionError
    assert same_bits(model(inputs()), before)
    assert torch.is_grad_enabled()


def test_modules_to_save():
    model = adapted(dk.LoRA(r=3), modules_to_save=["head"])
    assert isinstance(model.head, TrainedCopy)
    assert model.head.weight is model.head.copies["default"].weight  # what reads it, reads this
    assert model.head.out_features == 6
    moved, base = model(inputs()), Net()
    assert not torch.equal(model.head.weight, base.head.weight)
    model(inputs()).square().sum().backward()
    assert model.head.copies["default"].weight.grad is not None
    assert model.head.original.weight.grad is None
    with dk.disable(model):
        assert same_bits(model(inputs()), base(inputs()))
    removed = dk.remove(copy.deepcopy(model))
    assert type(removed.head) is nn.Linear
    assert same_bits(removed(inputs()), base(inputs()))
    merged = dk.remove(dk.merge(model))
    assert type(merged.head) is nn.Linear
    torch.testing.assert_close(merged(inputs()), moved)


def test_modules_to_save_of_two_adapters_and_under_two_names():
    model = Net()
    model.others = nn.ModuleList([model.head])
    dk.adapt(model, dk.LoRA(r=2), LAYERS, adapter_name="one", modules_to_save=["head"])
    assert model.others[0] is model.head
    perturb(model)
    one = model(inputs())
    dk.adapt(model, dk.LoRA(r=2), LAYERS, adapter_name="two", modules_to_save=["head"])
    assert same_bits(model.head.copies["two"].weight, Net().head.weight)
    torch.testing.assert_close(model(inputs()), Net()(inputs()))
    assert same_bits(dk.set_adapter(model, "one")(inputs()), one)
    dk.adapt(model, dk.LoRA(r=2), LAYERS, adapter_name="three")
    torch.testing.assert_close(model(inputs()), Net()(inputs()))  # the original head
    dk.remove(model)
    assert model.others[0] is model.head
    assert type(model.head) is nn.Linear


def test_a_module_within_a_saved_module_is_trained_with_it():
    model = dk.adapt(Net(), dk.LoRA(r=2), ["first"], modules_to_save=["middle", "middle.1"])
    assert isinstance(model.middle, TrainedCopy)
    assert not any(isinstance(m, TrainedCopy) for m in model.middle.copies["default"].modules())
    assert dk.remove(model).middle[1].weight.shape == (16, 20)


# Optimizer groups


def test_parameter_groups():
    model = dk.adapt(Net(), dk.LoRA(r=2), ["first"], modules_to_save=["head"], bias="lora_only")
    dk.adapt(model, dk.SSB(), ["middle.1"])
    names = {id(p): n for n, p in model.named_parameters()}
    groups = dk.param_groups(model, 1e-2, weight_decay=0.1, loraplus_lr_ratio=16)
    listed = [(g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in groups]
    assert listed == [
        (1e-2, 0.1, {"first.adapters.default.down", "head.copies.default.weight"}),
        (16e-2, 0.1, {"first.adapters.default.up"}),
        (1e-2, 0.0, {"middle.1.adapters.default.in_scale", "middle.1.adapters.default.out_scale"}),
        (1e-2, 0.0, {"head.copies.default.bias"}),
    ]
    torch.optim.AdamW(groups)  # an optimizer takes them
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything})


def test_decay_to_one():
    model = adapted(dk.SSB())
    groups = dk.param_groups(model, 0.1, weight_decay=0.5, decay_scales_to_one=True)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    dk.decay_to_one(optimizer)
    scale = model.first.adapters["default"].in_scale
    before = scale.detach().clone()
    model(inputs()).sum().backward()
    optimizer.step()
    expected = before - 0.1 * 0.5 * (before - 1) - 0.1 * scale.grad
    torch.testing.assert_close(scale.detach(), expected)
    optimizer.zero_grad()
    for _ in range(2000):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    torch.testing.assert_close(scale.detach(), torch.ones_like(scale))


def test_what_trains_is_counted_once(capsys):
    model = dk.adapt(Net(), dk.VeRA(r=4), LAYERS)
    line = dk.print_trainable_parameters(model)
    assert capsys.readouterr().out.strip() == line
    trained = 2 * 4 + 20 + 16
    everything = sum(p.numel() for p in Net().parameters()) + trained + 4 * 20 + 20 * 4
    assert line.startswith(f"trainable params: {trained:,} || all params: {everything:,} ||")


# Training as it is done


def _step(model, x, seed=3, wrap=None):
    model.zero_grad()
    torch.manual_seed(seed)
    run = model if wrap is None else wrap
    run(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("mode", ["branch", "peft"])
@pytest.mark.parametrize("name", ["lora", "dora", "lora_dash", "vera", "spectral_additive"])
def test_gradient_checkpointing_with_dropout(name, mode, reentrant):
    """The mask is drawn again in the recomputation: the gradients are the same, bit for bit."""
    options = {"dropout_mode": mode} if name == "dora" else {}
    if mode == "peft" and name != "dora":
        assert "dropout_mode" not in vars(METHODS[name].small())
        return
    small = METHODS[name].small()
    method = type(small)(**{**vars(small), "dropout": 0.4, **options})
    model = adapted(method)
    x = inputs().requires_grad_()
    plain = _step(model, x)
    assert plain
    other_seed = _step(model, x, seed=4)
    assert any(not torch.equal(plain[key], other_seed[key]) for key in plain)

    def checkpointed(x):
        return checkpoint(lambda x: checkpoint(model, x, use_reentrant=reentrant), x,
                          use_reentrant=reentrant)  # fmt: skip

    again = _step(model, x, wrap=checkpointed)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)


def test_gradient_checkpointing_of_transformers():
    model = llama()
    perturb(dk.adapt(model, dk.DoRA(r=2, dropout=0.3))).train()
    tokens = torch.arange(8)[None]

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(tokens, labels=tokens).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = gradients()
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[key], again[key]) for key in plain)


@every_method
def test_gradients_accumulate(name):
    model = adapted(METHODS[name].small(), torch.float64).eval()
    x = inputs(6, 12, dtype=torch.float64)
    whole = _step(model, x)
    model.zero_grad()
    for part in x.split(2):
        model(part).square().sum().backward()
    for key, parameter in model.named_parameters():
        if key in whole:
            torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-11, atol=1e-12)
    assert whole


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_gives_the_dtypes_that_a_linear_gives(name, dtype):
    model, plain = adapted(METHODS[name].small(), dtype).eval(), Net(dtype).requires_grad_()
    for given in (torch.float32, torch.bfloat16):
        results = []
        for one in (model, plain):
            x = inputs(dtype=given).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = one(x)
            y.float().square().sum().backward()
            results.append((y.dtype, x.grad.dtype))
            for parameter in one.parameters():
                if parameter.grad is not None:
                    assert parameter.grad.dtype == parameter.dtype
                    assert parameter.grad.isfinite().all()
        assert results[0] == results[1] == (torch.bfloat16, given)
    exact = copy.deepcopy(model).double()(inputs().double())
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(inputs(dtype=dtype)).double() - exact).abs().max() / exact.abs().max()
    assert error < 40 * torch.finfo(torch.bfloat16).eps


@every_method
def test_inputs_of_every_shape(name):
    model = adapted(METHODS[name].small(), torch.float64).eval()
    x = inputs(4, 3, 12, dtype=torch.float64)
    y = model(x)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(model(x[0, 0]), y[0, 0], **close)  # 1-D
    torch.testing.assert_close(model(x[0]), y[0], **close)
    torch.testing.assert_close(model(x[None, :, None]), y[None, :, None], **close)
    apart = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not apart.is_contiguous()
    torch.testing.assert_close(model(apart), y, **close)
    torch.testing.assert_close(model(x[:1].expand(5, 3, 12)), y[:1].expand(5, 3, 6), **close)
    for empty in ((0, 12), (2, 0, 12)):
        x = torch.empty(empty, dtype=torch.float64, requires_grad=True)
        out = model(x)
        assert out.shape == (*empty[:-1], 6)
        out.sum().backward()
        assert x.grad.shape == empty
        for parameter in model.parameters():
            assert parameter.grad is None or not parameter.grad.any()


@every_method
def test_output_gradients_of_every_layout(name):
    model = adapted(METHODS[name].small(), torch.float64).eval()

    def gradients(dy):
        x = inputs(4, 12, dtype=torch.float64).requires_grad_()
        model.zero_grad()
        model(x).backward(dy)
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    row = torch.randn(6, dtype=torch.float64)
    one = torch.tensor(0.7, dtype=torch.float64)
    for dy in (row.expand(4, 6), one.expand(4, 6), torch.randn(6, 4, dtype=torch.float64).T):
        given = gradients(dy)
        expected = gradients(dy.contiguous())
        assert len(given) == len(expected) > 1
        for a, b in zip(given, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_an_adapted_transformer_trains_and_its_base_stays():
    for make in (llama, bert, gpt2):
        base = make().state_dict()
        model = quietly(make(), dk.DoRA(r=2))
        tokens = torch.arange(8)[None]
        labels = torch.tensor([1]) if make is bert else tokens
        optimizer = torch.optim.AdamW(dk.param_groups(model, 5e-2))
        losses = []
        for _ in range(12):
            loss = model(tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05
        assert not any(isinstance(m, Decomposed) for m in dk.remove(model).modules())
        assert all(same_bits(t, base[n]) for n, t in model.state_dict().items())
