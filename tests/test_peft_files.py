"""PEFT's adapter files both ways: what we write PEFT loads, what it writes we load."""

import copy
import dataclasses
import re

import peft
import pytest
import torch
import transformers
from peft.utils.save_and_load import get_peft_model_state_dict
from peft_folders import (
    CASES,
    TARGETS,
    Net,
    config_of,
    inputs,
    moved,
    ours,
    state,
    tensors_of,
    theirs,
)
from safetensors.torch import save_file
from torch import nn

import decomp_kernels as dk
from decomp_kernels.linear import adapted_layers
from decomp_kernels.testing import assert_as_good_as, relative_error

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def table(tensors):
    return {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}


def once(keys):
    """Without what bias="all" makes PEFT write three times."""
    return {k: v for k, v in keys.items() if ".original_module." not in k
            and ".modules_to_save." not in k}  # fmt: skip


@every_case
def test_ours_to_peft_and_back(name, tmp_path):
    case, x = CASES[name], inputs()
    model = ours(case)
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3  # it moves the output
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(loaded(x), y) < 1e-12
    written = once(table(get_peft_model_state_dict(theirs(case))))
    assert table(tensors_of(tmp_path / "ours")) == written
    fields = {field.name for field in dataclasses.fields(getattr(peft, case.config))}
    assert set(config_of(tmp_path / "ours")) <= fields
    loaded.save_pretrained(tmp_path / "peft")
    again = dk.load_adapter(Net(), tmp_path / "peft")
    assert relative_error(again(x), y) < 1e-12
    before, after = state(model), state(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@every_case
def test_peft_to_ours_and_back(name, tmp_path):
    case, x = CASES[name], inputs()
    model = theirs(case)
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3
    model.save_pretrained(tmp_path / "peft")
    loaded = dk.load_adapter(Net(), tmp_path / "peft")
    assert relative_error(loaded(x), y) < 1e-12
    dk.save_adapter(loaded, tmp_path / "ours", format="peft")
    back, saved = tensors_of(tmp_path / "ours"), once(tensors_of(tmp_path / "peft"))
    assert table(back) == table(saved)
    for key, tensor in saved.items():
        assert torch.equal(back[key], tensor), key
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(again(x), y) < 1e-12


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "adalora", "vera", "hira", "oft, r"])
def test_on_a_bf16_base_ours_is_no_further_from_float64_than_pefts(name, tmp_path):
    case, x = CASES[name], inputs(torch.bfloat16)
    model = theirs(case, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = dk.load_adapter(Net(torch.bfloat16), tmp_path)
    exact = copy.deepcopy(model).double()(x.double())
    assert relative_error(Net(torch.bfloat16)(x), exact) > 0.02
    assert_as_good_as(loaded(x), model(x), exact, name)
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}  # as PEFT loads it
    dk.save_adapter(loaded, tmp_path / "again", format="peft")
    assert table(tensors_of(tmp_path / "again")) == table(tensors_of(tmp_path))


def test_adapters_of_16_bits_are_loaded_in_float32(tmp_path):
    model = theirs(CASES["dora"], torch.float32)
    model.save_pretrained(tmp_path)
    halves = {key: t.to(torch.bfloat16) for key, t in tensors_of(tmp_path).items()}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    stock = peft.PeftModel.from_pretrained(Net(torch.bfloat16), tmp_path)
    loaded = dk.load_adapter(Net(torch.bfloat16), tmp_path)
    for layer in adapted_layers(loaded).values():
        assert {p.dtype for p in layer.adapters["default"].parameters()} == {torch.float32}
    x = inputs(torch.bfloat16)
    exact = copy.deepcopy(stock).double()(x.double())
    assert_as_good_as(loaded(x), stock(x), exact, "y")


def test_ia3_and_ssl_are_one_configuration(tmp_path):
    config = peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS[1:])
    stock, x = moved(peft.get_peft_model(Net(), config)), inputs()
    stock.save_pretrained(tmp_path / "peft")
    model = dk.load_adapter(Net(), tmp_path / "peft")
    kinds = {p: type(m.adapters["default"].method) for p, m in adapted_layers(model).items()}
    assert kinds == dict(zip(TARGETS, [dk.IA3, dk.SSL, dk.SSL], strict=True))
    assert relative_error(model(x), stock(x)) < 1e-12
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    assert table(tensors_of(tmp_path / "ours")) == table(tensors_of(tmp_path / "peft"))
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(again(x), stock(x)) < 1e-12


def test_ia3_that_leaves_the_bias_alone_is_pefts_where_there_is_none(tmp_path):
    model = moved(dk.adapt(Net(), dk.IA3(), ["down"]))
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(again(inputs()), model(inputs())) < 1e-12
    model = moved(dk.adapt(Net(), dk.IA3(), ["up"]))
    with pytest.raises(ValueError, match=r"IA3\(scale_bias=False\) cannot be saved as PEFT's"):
        dk.save_adapter(model, tmp_path / "other", format="peft")
    assert not (tmp_path / "other").exists()


def test_adalora_after_its_ranks_were_shared_out(tmp_path):
    """PEFT leaves the masked triplets out of the file; its scale stays that of init_r."""
    stock, x = theirs(CASES["adalora"]), inputs()
    kept = {
        f"{path}.lora_E.default": mask
        for path, mask in zip(
            TARGETS, ([True, False, True, True], [False] * 3 + [True], [True] * 4), strict=True
        )
    }
    stock.peft_config["default"].rank_pattern = kept
    for name, mask in kept.items():
        with torch.no_grad():
            stock.get_parameter(f"base_model.model.{name}")[~torch.tensor(mask)] = 0
    y = stock(x)
    stock.save_pretrained(tmp_path / "peft")
    assert tensors_of(tmp_path / "peft")["base_model.model.block.up.lora_A"].shape == (3, 32)
    model = dk.load_adapter(Net(), tmp_path / "peft")
    assert relative_error(model(x), y) < 1e-12
    down = model.block.down.adapters["default"]
    assert down.core.shape == (4,)
    assert down.core.count_nonzero() == 1
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(again(x), y) < 1e-12


def test_vera_without_its_projections(tmp_path):
    fields = {**CASES["vera"].fields, "save_projection": False}
    stock, x = theirs(CASES["vera"]._replace(fields=fields)), inputs()
    stock.save_pretrained(tmp_path)
    assert not any("vera_A" in key for key in tensors_of(tmp_path))
    model = dk.load_adapter(Net(), tmp_path)
    assert relative_error(model(x), stock(x)) < 1e-12
    assert model.block.up.adapters["default"].shared_up is (
        model.other.down.adapters["default"].shared_up
    )


def test_hira_whose_rank_pattern_peft_did_not_follow(tmp_path):
    fields = {"r": 4, "rank_pattern": {"up": 2}}
    stock = theirs(CASES["hira"]._replace(fields=fields))
    stock.save_pretrained(tmp_path)
    model = dk.load_adapter(Net(), tmp_path)
    assert relative_error(model(inputs()), stock(inputs())) < 1e-12
    tensors, up = tensors_of(tmp_path), "base_model.model.block.up.hira_"
    tensors[f"{up}A"] = tensors[f"{up}A"][:2].clone()  # as a PEFT that follows it writes it
    tensors[f"{up}B"] = tensors[f"{up}B"][:, :2].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = dk.load_adapter(Net(), tmp_path)
    assert [m.adapters["default"].method.r for m in adapted_layers(model).values()] == [2, 4, 4]


def test_pefts_layers_to_transform(tmp_path):
    """Which layers have tensors is what counts, whatever rule chose them."""
    config = peft.LoraConfig(
        r=4, target_modules=["up", "down"], exclude_modules=["other.up"], init_lora_weights=False
    )
    stock = peft.get_peft_model(Net(), config).eval()
    stock.save_pretrained(tmp_path)
    model = dk.load_adapter(Net(), tmp_path)
    assert set(adapted_layers(model)) == {"block.up", "block.down", "other.down"}
    assert relative_error(model(inputs()), stock(inputs())) < 1e-12


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def llama(cls=transformers.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, initializer_range=0.3, pad_token_id=0, **options,
    )  # fmt: skip
    return cls(config).double().eval()


TOKENS = torch.tensor([[5, 7, 11, 13]])
CONV1D = {
    "lora": (dk.LoRA(r=4), {"r": 4}),
    "dora": (dk.DoRA(r=4), {"r": 4, "use_dora": True}),
    "adalora": (dk.AdaLoRA(r=4, target_r=2), {"init_r": 4, "target_r": 2, "total_step": 9}),
    "ia3": (dk.IA3(scale_bias=True), {"feedforward_modules": []}),
    "vera": (dk.VeRA(r=4), {"r": 4}),
    "hira": (dk.HiRA(r=4), {"r": 4}),
}


@pytest.mark.parametrize("name", CONV1D)
def test_gpt2s_conv1d_both_ways(name, tmp_path):
    method, fields = CONV1D[name]
    model = moved(dk.adapt(gpt2(), method, ["c_attn", "c_proj"]))
    y = model(TOKENS).logits
    assert relative_error(gpt2()(TOKENS).logits, y) > 1e-3
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    assert config_of(tmp_path / "ours")["fan_in_fan_out"] is True
    assert config_of(tmp_path / "ours")["target_modules"] == ["c_attn", "c_proj"]
    stock = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert relative_error(stock(TOKENS).logits, y) < 1e-12
    cls = getattr(peft, method.peft_form.config)
    config = cls(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **fields)
    stock = moved(peft.get_peft_model(gpt2(), config))
    stock.save_pretrained(tmp_path / "peft")
    model = dk.load_adapter(gpt2(), tmp_path / "peft")
    assert relative_error(model(TOKENS).logits, stock(TOKENS).logits) < 1e-12


@pytest.mark.parametrize("name", ["oft", "boft", "hra", "loha", "lokr", "sparse"])
def test_what_peft_does_not_put_on_a_conv1d_is_refused(name, tmp_path):
    method = dk.methods()[name].small()
    config = CASES[name].config
    model = dk.adapt(gpt2(), method if name != "sparse" else dk.Sparse(r=1), ["c_attn"])
    with pytest.raises(ValueError, match=f"PEFT's {config} does not fit a Conv1D"):
        dk.save_adapter(model, tmp_path, format="peft")
    with pytest.raises((TypeError, ValueError), match="not supported"):
        fields = CASES[name].fields
        peft.get_peft_model(gpt2(), getattr(peft, config)(target_modules=["c_attn"], **fields))


def test_a_causal_model_is_loaded_as_one(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    moved(dk.adapt(model, dk.LoRA(r=4), ["q_proj", "v_proj"]))
    y = model(TOKENS).logits
    dk.save_adapter(model, tmp_path / "run", format="peft")
    config = config_of(tmp_path / "run")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(loaded(TOKENS).logits, y) or relative_error(loaded(TOKENS).logits, y) < 1e-6


@pytest.mark.parametrize("head", [None, ["score"]])
def test_a_head_that_peft_would_look_for(head, tmp_path):
    """PEFT's class for classification trains the head: without one in the file it cannot load."""

    def base():
        return llama(transformers.LlamaForSequenceClassification, num_labels=3)

    model = moved(dk.adapt(base(), dk.LoRA(r=4), ["q_proj"], modules_to_save=head))
    dk.save_adapter(model, tmp_path, format="peft")
    assert config_of(tmp_path)["task_type"] == ("SEQ_CLS" if head else None)
    stock = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert isinstance(stock, peft.PeftModelForSequenceClassification) == bool(head)
    assert relative_error(stock(TOKENS).logits, model(TOKENS).logits) < 1e-12
    again = dk.load_adapter(base(), tmp_path)
    assert relative_error(again(TOKENS).logits, model(TOKENS).logits) < 1e-12


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (["block.up", "other.up"], ["up"]),
        (["block.up", "block.down"], ["block.down", "block.up"]),
        (["0", "1"], r"^(0|1)"),  # "0" would match block.0 too
    ],
)
def test_the_shortest_names_that_match_these_layers_alone(layers, found, tmp_path):
    def base():
        model = Net()
        model.block.add_module("0", nn.Linear(32, 32).double())
        model.add_module("0", nn.Linear(5, 5).double())
        model.add_module("1", nn.Linear(5, 5).double())
        return model

    model = moved(dk.adapt(base(), dk.LoRA(r=2), f"^({'|'.join(map(re.escape, layers))})$"))
    assert set(adapted_layers(model)) == set(layers)
    dk.save_adapter(model, tmp_path, format="peft")
    assert config_of(tmp_path)["target_modules"] == found
    stock = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert {n for n, m in stock.base_model.model.named_modules() if hasattr(m, "base_layer")} == (
        set(layers)
    )
