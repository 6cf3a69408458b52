"""accelerate: the states that a PEFT model can be in, what falls back and says so, and restore."""

import copy
import pickle
import sys

import peft
import pytest
import torch
from peft_models import (
    CONFIGS,
    Model,
    accelerated_layers,
    calls,
    configuration,
    moved,
    peft_model,
)
from torch import nn

import decomp_kernels as dk
from decomp_kernels.testing import relative_error

BOTH = 2  # layers of the model


def pair(name="lora"):
    """(PEFT's model, the same accelerated) in float64, and an input."""
    stock = peft_model(name, torch.float64)
    return stock, dk.accelerate(copy.deepcopy(stock)), torch.randn(6, 24, dtype=torch.float64)


def last_calls(model):
    """What the forwards since the last look counted; the layers must agree."""
    counted = calls(model)
    for layer in accelerated_layers(model).values():
        layer.fused.calls.clear()
    assert counted == [counted[0]] * BOTH
    return counted[0]


def same(stock, fast, x, counted):
    y, expected = fast(x), stock(x)
    assert last_calls(fast) == {counted: 1}
    assert relative_error(y, expected) < 1e-12
    return y


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "boft", "hira", "loha", "lokr"])
def test_merged_unmerged_and_disabled(name):
    stock, fast, x = pair(name)
    adapted = same(stock, fast, x, "fused")
    for model in (stock, fast):
        model.merge_adapter()
    assert relative_error(same(stock, fast, x, "merged"), adapted) < 1e-7
    for model in (stock, fast):
        model.unmerge_adapter()
    same(stock, fast, x, "fused")  # the weight is another one now, by a rounding
    with stock.disable_adapter(), fast.disable_adapter():
        assert relative_error(same(stock, fast, x, "disabled"), adapted) > 0.02
    same(stock, fast, x, "fused")
    assert type(fast.merge_and_unload().first) is nn.Linear


def test_two_adapters():
    stock, fast, x = pair()
    first = same(stock, fast, x, "fused")
    for model in (stock, fast):  # the second one comes after accelerate
        torch.manual_seed(1)
        model.add_adapter("other", configuration("dora", ["first", "second"]))
        model.set_adapter("other")
        moved(model)
    assert relative_error(same(stock, fast, x, "fused"), first) > 0.02
    for model in (stock, fast):
        model.base_model.set_adapter(["default", "other"])
    same(stock, fast, x, "several active adapters")
    for model in (stock, fast):
        model.set_adapter("default")
    assert torch.equal(same(stock, fast, x, "fused"), first)


def test_a_batch_of_several_adapters_is_pefts():
    stock, fast, x = pair()
    for model in (stock, fast):
        torch.manual_seed(1)
        model.add_adapter("other", configuration("rslora", ["first", "second"]))
        model.eval()
    names = ["default", "other", "__base__"] * 2
    y, expected = fast(x, adapter_names=names), stock(x, adapter_names=names)
    assert torch.equal(y, expected)
    assert last_calls(fast) == {"called with adapter_names": 1}


def test_an_adapter_of_other_layers_leaves_this_one_without():
    stock, fast, x = pair()
    for model in (stock, fast):
        torch.manual_seed(1)
        model.add_adapter("other", configuration("lora", ["second"]))
        model.set_adapter("other")
    assert relative_error(fast(x), stock(x)) < 1e-12
    assert calls(fast) == [{"no active adapter": 1}, {"fused": 1}]


def test_live_values_are_used():
    stock, fast, x = pair("lora-dropout")
    stock.eval(), fast.eval()
    before = same(stock, fast, x, "fused")
    for model in (stock, fast):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.set_scale("default", 3.0)
    assert relative_error(same(stock, fast, x, "fused"), before) > 0.02
    for model in (stock, fast):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.scale_layer(0.5)
            layer.lora_A["default"].weight = nn.Parameter(2 * layer.lora_A["default"].weight)
    same(stock, fast, x, "fused")
    for model in (stock, fast):
        model.train()
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.lora_dropout["default"].p = 0.0
    same(stock, fast, x, "fused")


def test_dora_follows_a_base_weight_that_changes():
    stock, fast, x = pair("dora")
    same(stock, fast, x, "fused")
    for model in (stock, fast):
        with torch.no_grad():
            model.base_model.model.first.base_layer.weight.mul_(3)
    same(stock, fast, x, "fused")
    state = {name: 2 * value for name, value in stock.state_dict().items()}
    for model in (stock, fast):
        model.load_state_dict(state)
    same(stock, fast, x, "fused")
    layer = fast.base_model.model.first
    assert layer.fused.norms
    fast.float()
    assert not layer.fused.norms


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dora_follows_a_start_that_changes_the_base_weight(start):
    _, fast, x = pair("dora")
    fast.float()(x.float())
    config = peft.LoraConfig(r=2, init_lora_weights=start, target_modules=["first", "second"])
    fast.add_adapter("other", config)
    stock = dk.restore(copy.deepcopy(fast))
    assert relative_error(fast(x.float()), stock(x.float())) < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "hira"])
def test_transforms_of_torch_func_are_pefts(name):
    stock, fast, x = pair(name)
    for transformed in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        y, expected = (transformed(model)(x) for model in (fast, stock))
        assert relative_error(y, expected) < 1e-12
    with torch.autograd.forward_ad.dual_level():
        fast(torch.autograd.forward_ad.make_dual(x, x))
    assert "torch.func" in dk.report(fast)
    last_calls(fast)
    same(stock, fast, x, "fused")


def add_hook(which):
    def add(layer):
        module = {"base": layer.base_layer, "lora_A": layer.lora_A["default"]}[which]
        module.register_forward_hook(lambda *_: None)

    return add


class Tagged(torch.Tensor):
    """A tensor subclass, as DTensor is one."""


def tag_weight(layer):
    weight = layer.lora_B["default"].weight
    layer.lora_B["default"].weight = nn.Parameter(weight.detach().as_subclass(Tagged))


def subclass_part(layer):
    class Sharded(nn.Linear):
        pass

    layer.lora_A["default"].__class__ = Sharded


def other_variant(layer):
    class Variant:
        @staticmethod
        def forward(module, active_adapter, x, result, **_):
            return result

    layer.lora_variant["default"] = Variant()


def train_base(layer):
    layer.base_layer.weight.requires_grad_()


def scale_tensor(layer):
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def no_casting(layer):
    layer.cast_input_dtype_enabled = False


def replace_forward(layer):
    layer.base_layer.forward = layer.base_layer.forward


def parametrize(layer):
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())


def wrap_base(layer):  # as trainable_token_indices does with a tied lm_head
    layer.base_layer = nn.Sequential(layer.base_layer)


REASONS = {
    add_hook("base"): "its base layer has hooks",
    add_hook("lora_A"): "its lora_A has hooks",
    tag_weight: "it holds or is given a Tagged",
    subclass_part: "Sharded",
    other_variant: "its variant is",
    train_base: "its base weight trains",
    scale_tensor: "its scale is a tensor",
    no_casting: "the casting of its input is disabled",
    replace_forward: "its base layer has hooks",
    parametrize: "its base layer is torch.nn.utils.parametrize.ParametrizedLinear",
    wrap_base: "its base layer is torch.nn.modules.container.Sequential",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__qualname__)
def test_what_the_operator_cannot_stand_in_for_is_pefts(change):
    stock, fast, x = pair()
    for model in (stock, fast):
        change(model.base_model.model.first)
    y, expected = (model(x).as_subclass(torch.Tensor) for model in (fast, stock))
    assert relative_error(y, expected) < 1e-12
    (reason,) = fast.base_model.model.first.fused.calls
    assert REASONS[change] in reason
    assert reason in dk.report(fast)


def test_hra_without_an_orthonormal_basis_is_pefts():
    model = nn.Sequential(nn.Linear(3, 5))
    config = peft.HRAConfig(r=4, apply_GS=True, target_modules=["0"])
    stock = moved(peft.get_peft_model(model, config))
    fast, x = dk.accelerate(copy.deepcopy(stock)), torch.randn(6, 3)
    assert torch.equal(fast(x), stock(x))
    assert calls(fast) == [{"more reflections than in_features": 1}]


@pytest.mark.parametrize("name", ["dora", "hra", "loha-9"])
def test_adapters_narrower_than_their_base_are_pefts_under_autocast(name):
    stock, fast, x = pair(name)
    for model in (stock.float(), fast.float()):
        for key, parameter in model.named_parameters():
            if "base_layer" not in key:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x.float()), stock(x.float()))
    assert "its adapter torch.bfloat16" in dk.report(fast)


def test_hooks_inside_still_fire():
    _, fast, x = pair()
    seen = []
    handle = fast.base_model.model.first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    fast(x)
    assert seen == [1]
    handle.remove()
    fast(x)
    assert fast.base_model.model.first.fused.calls["fused"] == 1


def test_dtensors_are_pefts():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        stock, fast, x = pair()
        expected = stock(x)
        for module in fast.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    whole = nn.Parameter(distribute_tensor(p.detach(), mesh), p.requires_grad)
                    module._parameters[name] = whole
        y = fast(distribute_tensor(x, mesh)).full_tensor()
        assert relative_error(y, expected) < 1e-12
        assert last_calls(fast) == {"its weight is a DTensor": 1}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
def test_restore_is_exact(name):
    stock = peft_model(name)
    before = {
        path: (type(m), set(vars(m)), {key: id(p) for key, p in m._parameters.items()})
        for path, m in stock.named_modules()
    }
    keys = list(stock.state_dict())
    x = torch.randn(4, 24)
    expected = stock.eval()(x)
    assert dk.accelerate(stock) is stock
    assert dk.accelerate(stock) is stock  # once more changes nothing
    stock(x)
    assert list(stock.state_dict()) == keys
    assert len(accelerated_layers(stock)) == BOTH
    assert dk.restore(stock) is stock
    after = {
        path: (type(m), set(vars(m)), {key: id(p) for key, p in m._parameters.items()})
        for path, m in stock.named_modules()
    }
    assert after == before
    assert torch.equal(stock(x), expected)


def test_no_other_model_is_touched():
    earlier, model = peft_model("lora"), peft_model("lora")
    classes = [peft.tuners.lora.layer.Linear, nn.Linear]
    before = [dict(vars(cls)) for cls in classes]
    dk.accelerate(model)
    assert [dict(vars(cls)) for cls in classes] == before
    for other in (earlier, peft_model("lora")):
        assert type(other.base_model.model.first) is peft.tuners.lora.layer.Linear


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "oft", "vera"])
def test_copies_and_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stock, fast, x = pair(name)
    expected = same(stock, fast, x, "fused")
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(x), expected)
    assert type(again.base_model.model.first) is type(fast.base_model.model.first)
    last_calls(again)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(2)
    assert relative_error(copied(x), expected) > 0.02
    assert torch.equal(fast(x), expected)
    for model, folder in ((stock, "stock"), (fast, "fast")):
        model.save_pretrained(tmp_path / folder)
    written = {p.name: p.read_bytes() for p in (tmp_path / "stock").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "fast").iterdir()}
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Model().double(), tmp_path / "fast").double()
    assert relative_error(dk.accelerate(loaded)(x), loaded.merge_and_unload()(x)) < 1e-6


def test_training_moves_what_peft_moves():
    stock, fast, x = pair("lora")
    for model in (stock, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert relative_error(q, p) < 1e-9, name


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)

    def forward(self, ids):
        return self.conv(self.linear(self.embed(ids))[..., None, None].flatten(0, 1)).flatten(1)


def test_the_report_has_every_layer_and_says_why():
    config = peft.LoraConfig(r=2, target_modules=["embed", "linear", "conv"])
    model = peft.get_peft_model(Mixed(), config)
    with pytest.warns(UserWarning, match="not accelerated: .*embed.*Embedding.*conv.*Conv2d"):
        dk.accelerate(model)
    ids = torch.arange(6).view(2, 3)
    model(ids)
    model.merge_adapter()
    model(ids)
    no_form = "not accelerated, there is no form for peft.tuners.lora.layer"
    assert dk.report(model).splitlines() == [
        f"base_model.model.embed: {no_form}.Embedding",
        "base_model.model.linear: accelerated, 1 fused, PEFT's own: 1 merged",
        f"base_model.model.conv: {no_form}.Conv2d",
    ]
    dk.restore(model)
    assert "linear: not accelerated, accelerate was not called" in dk.report(model)


def test_models_without_peft_layers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="has no PEFT layer to accelerate"):
        dk.accelerate(dk.adapt(Model(), dk.LoRA(r=2)))
    with pytest.raises(TypeError, match="must be an nn.Module"):
        dk.accelerate("model")
    assert dk.report(Model()) == "nothing is adapted"
    assert "LoRA" in dk.report(dk.adapt(Model(), dk.LoRA(r=2)))
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    with pytest.raises(ImportError, match="pip install peft"):
        dk.accelerate(Model())


def test_our_own_switches_do_not_pass_over_pefts_adapters():
    model = dk.accelerate(peft_model("lora"))
    with pytest.raises(ValueError, match=r"use PEFT's model.disable_adapter\(\)"):
        dk.disable(model).__enter__()
    with pytest.raises(ValueError, match=r"use PEFT's model.merge_adapter\(\)"):
        dk.merge(model)


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    model = peft_model("lora")
    layer = model.base_model.model.first
    layer.forward = layer.forward
    with pytest.warns(UserWarning, match="first: its forward was replaced"):
        dk.accelerate(model)
    assert list(accelerated_layers(model)) == ["base_model.model.second"]


def test_restore_is_refused_where_a_forward_was_wrapped_since():
    _, fast, _ = pair()
    layer = fast.base_model.model.second
    layer.forward = layer.forward  # as accelerate's add_hook_to_module leaves it
    with pytest.raises(ValueError, match="second was replaced .* after accelerate"):
        dk.restore(fast)
    assert len(accelerated_layers(fast)) == BOTH  # nothing was changed
    del layer.forward
    assert not accelerated_layers(dk.restore(fast))


def test_a_transformers_model_with_an_adapter():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = LlamaForCausalLM(config).double()
    stock.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    moved(stock)
    fast = dk.accelerate(copy.deepcopy(stock))
    ids = torch.arange(8)[None]
    assert relative_error(fast(ids).logits, stock(ids).logits) < 1e-12
    assert calls(fast) == [{"fused": 1}] * 2
