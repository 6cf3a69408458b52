"""Our methods as PEFT methods: PEFT's whole life of an adapter, held to ``dk.adapt``."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import decomp_kernels as dk
from decomp_kernels.methods import diff_pruning, lora_dash
from decomp_kernels.methods.base import Method

ROOT = Path(__file__).parent.parent
CONFIGS = vars(dk.register_with_peft())
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda c: c.__name__)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(24, 32)
        self.k = nn.Linear(32, 20, bias=False)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        return self.head(torch.relu(self.k(torch.relu(self.q(x)))))


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return Net().to(dtype).eval()


def made(config, **options):
    """A configuration with the options of Method.small, on q and k."""
    small = config.method_class.small()
    own = {field.name: getattr(small, field.name) for field in fields(small)}
    return config(**{"target_modules": ["q", "k"], **own, **options})


def adapters(model, name="default"):
    """{path: our adapter} of a PEFT model."""
    layers = dict(model.base_model.model.named_modules())
    return {path: layers[path].adapters[name] for path in ("q", "k")}


@torch.no_grad()
def perturb(model, name="default"):
    for adapter in adapters(model, name).values():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def wrapped(config, dtype=torch.float32, **options):
    """A PEFT model in evaluation whose adapter moves the output."""
    model = get_peft_model(net(dtype), made(config, **options)).eval()
    perturb(model)
    return model


def inputs(dtype=torch.float32):
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(2)).to(dtype)


def run(script, *arguments, path=()):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env=env, cwd=ROOT / "tests", timeout=300,
    )  # fmt: skip


# --- what is registered


def test_every_method_that_peft_lacks_is_registered_under_a_name_of_its_own():
    registered = {config.method_class for config in CONFIGS.values()}
    lacking = {method for method in dk.methods().values() if method.peft_form is None}
    assert lacking | {dk.SSL} == registered
    assert {dk.SSB, dk.SVDiff, dk.MiLoRA, dk.LoRADash} <= registered
    theirs = {member.value for member in peft.PeftType if not member.value.startswith("DK_")}
    for name, config in CONFIGS.items():
        assert name == f"{config.method_class.__name__}Config"
        assert config().peft_type == f"DK_{config.method_class.name.upper()}"
        assert config().peft_type not in theirs
        assert config().to_dict()["peft_type"] != "LORA"


@EVERY
def test_all_that_a_method_needs_is_in_its_own_tensors(config):
    """PEFT's layer saves an adapter's state dict and calls neither refresh nor share."""
    method = config.method_class
    assert method.refresh is Method.refresh
    assert method.share is Method.share
    adapter = adapters(wrapped(config))["q"]
    assert {name for name, _ in adapter.named_buffers()} <= set(adapter.state_dict())
    assert adapter.frozen == set()


def test_registering_again_and_from_many_threads_gives_the_same_classes():
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(vars(dk.register_with_peft())))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONFIGS] * 8


def test_without_peft_the_message_names_what_does_without():
    done = run("import sys; sys.modules['peft'] = None; import decomp_kernels as dk\n"
               "dk.register_with_peft()")  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: register_with_peft needs PEFT")
    assert "decomp_kernels.adapt, save_adapter and load_adapter" in last


# --- options


def test_options_are_the_methods_and_are_checked_by_it():
    config = CONFIGS["TriLoRAConfig"](r=3, alpha=6, target_modules=["q"])
    assert config.method() == dk.TriLoRA(r=3, alpha=6)
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        CONFIGS["TriLoRAConfig"](r=0)
    with pytest.raises(TypeError, match="alpha"):
        CONFIGS["TriLoRAConfig"](alpha="a lot")
    with pytest.raises(TypeError, match="rank"):
        CONFIGS["TriLoRAConfig"](rank=3)
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules as a list"):
        CONFIGS["SSBConfig"](target_modules="q.*", layers_to_transform=[0])
    with pytest.raises(ValueError, match="layers_pattern"):
        CONFIGS["SSBConfig"](target_modules=["q"], layers_pattern="layers")


@EVERY
def test_a_configuration_comes_back_from_json_and_pickle(config, tmp_path):
    first = made(config, modules_to_save=["head"], exclude_modules=["lm"])
    first.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is config
    assert again.method() == first.method() == config.method_class.small()
    assert (again.target_modules, again.modules_to_save) == ({"q", "k"}, ["head"])
    assert pickle.loads(pickle.dumps(first)) == first


def test_layers_are_chosen_by_peft_s_rules():
    layers = nn.ModuleList([Net(), Net(), Net()])
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})
    config = CONFIGS["SSBConfig"](
        target_modules=["q", "k"], exclude_modules=["model.layers.2.k"], layers_to_transform=[0, 2],
        layers_pattern="layers",
    )  # fmt: skip
    get_peft_model(model, config)
    chosen = [path for path, m in model.named_modules() if "Decomposed" in type(m).__name__]
    assert chosen == ["model.layers.0.q", "model.layers.0.k", "model.layers.2.q"]


# --- one model


@EVERY
def test_output_and_gradients_are_those_of_adapt(config):
    theirs = wrapped(config)
    ours = dk.adapt(net(), config.method_class.small(), ["q", "k"]).eval()
    x, plain = inputs(), net()(inputs())
    trained = {
        name.split("dk_")[0] + name.rpartition("default.")[2]: parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    for path, adapter in adapters(theirs).items():
        ours.get_submodule(path).adapters["default"].load_state_dict(adapter.state_dict())
    expected, y = ours(x), theirs(x)
    assert torch.equal(y, expected)
    assert (y - plain).abs().max() > 1e-3
    expected.square().sum().backward()
    y.square().sum().backward()
    ours_trained = {
        f"base_model.model.{name.replace('adapters.default.', '')}": parameter
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    assert list(trained) == list(ours_trained)
    for name, parameter in trained.items():
        assert torch.equal(parameter.grad, ours_trained[name].grad), name


@EVERY
def test_training_moves_the_adapter_and_the_saved_module_alone(config):
    model = wrapped(config, modules_to_save=["head"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs()).square().sum().backward()
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved <= trained
    still = trained - moved  # directions that are not selected yet, and an indifferent place
    assert all(name.endswith("core") for name in still) and (not still or "Dash" in config.__name__)
    assert {name.rpartition(".")[0] for name in trained} == {
        "base_model.model.head.modules_to_save.default",
        *(f"base_model.model.{path}.dk_{config.method_class.name}_adapters.default"
          for path in ("q", "k")),
    }  # fmt: skip


@EVERY
def test_disable_adapter_is_the_base_bit_for_bit(config):
    model, plain = wrapped(config), net()
    moved = model(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), plain(inputs()))
    assert torch.equal(model(inputs()), moved)
    assert not torch.equal(moved, plain(inputs()))
    assert all(
        torch.equal(t, model.unload().state_dict()[n]) for n, t in plain.state_dict().items()
    )


# --- files


LOAD_ALL = """
import json, sys, threading
from pathlib import Path
import torch
import decomp_kernels as dk
assert "peft" not in sys.modules
found = []
register = lambda: found.append(vars(dk.register_with_peft()))
threads = [threading.Thread(target=register) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(found) == 8 and all(one == found[0] for one in found)
from peft import PeftModel
from test_register_with_peft import inputs, net
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = PeftModel.from_pretrained(net(), folder)
    print(json.dumps({folder.name: [v.hex() for v in model(inputs()).flatten().tolist()]}))
"""


def test_a_fresh_process_loads_every_method_bit_for_bit(tmp_path):
    """There eight threads register at once."""
    expected = {}
    for name, config in CONFIGS.items():
        model = wrapped(config, modules_to_save=["head"])
        start = model(inputs())
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path / name)
        assert not torch.equal(model(inputs()), start)
        expected[name] = [value.hex() for value in model(inputs()).flatten().tolist()]
    done = run(LOAD_ALL, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = {}
    for line in done.stdout.strip().splitlines():
        loaded.update(json.loads(line))
    assert loaded == expected


UNREGISTERED = """
import json, pickle, sys
from pathlib import Path
import peft.utils
import torch
import decomp_kernels as dk

def message(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

plain = message(peft.PeftModel.from_pretrained, torch.nn.Linear(4, 4), sys.argv[1] + "/files")
member, peft.utils.PeftType = peft.utils.PeftType, str
broken = message(dk.register_with_peft)
peft.utils.PeftType = member
model, x, y = pickle.loads((Path(sys.argv[1]) / "model.pickle").read_bytes())
config = type(model.active_peft_config).__name__
print(json.dumps([plain, broken, torch.equal(model(x), y), config]))
"""


def test_a_process_that_has_not_registered(tmp_path):
    """PEFT names a type it does not know; a failed attempt does no harm; a pickle registers."""
    config = CONFIGS["SVDiffConfig"](target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    nn.init.normal_(model.base_model.model[0].adapters["default"].delta)
    model.save_pretrained(tmp_path / "files")
    x = torch.randn(3, 6)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, x, model(x).detach())))
    done = run(UNREGISTERED, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, broken, same, config = json.loads(done.stdout.strip().splitlines()[-1])
    assert plain == "KeyError: 'DK_SVDIFF'"
    assert broken.startswith("RuntimeError: PEFT ")
    assert "cls must be an Enum of strings" in broken
    assert "decomp_kernels.adapt, save_adapter and load_adapter" in broken
    assert (same, config) == (True, "SVDiffConfig")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_files_come_back_bit_for_bit(config, dtype, tmp_path):
    """Into a model, on the meta device first, and as a second adapter under another name."""
    model = wrapped(config, dtype)
    expected = model(inputs(dtype))
    assert not torch.equal(expected, net(dtype)(inputs(dtype)))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net(dtype), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(inputs(dtype)), expected)
        assert {n: t.dtype for n, t in again.state_dict().items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }
        assert not any(parameter.requires_grad for parameter in again.parameters())
    second = get_peft_model(net(dtype), made(config)).eval()
    missing = second.load_adapter(tmp_path, "loaded")
    assert missing.missing_keys == []
    assert not torch.equal(second(inputs(dtype)), expected)
    second.set_adapter("loaded")
    assert torch.equal(second(inputs(dtype)), expected)


def test_adapters_of_a_bf16_model_are_float32_unless_told_otherwise():
    def dtypes(**options):
        config = made(CONFIGS["SpectralRotationalConfig"])
        model = get_peft_model(net(torch.bfloat16), config, **options)
        assert model(inputs(torch.bfloat16)).dtype == torch.bfloat16
        return {name: t.dtype for name, t in adapters(model)["q"].state_dict().items()}

    assert set(dtypes().values()) == {torch.float32}
    halves = {"singular_up", "singular_down"}
    ours = dk.adapt(
        net(torch.bfloat16), dk.SpectralRotational.small(), ["q"], autocast_adapter_dtype=False
    )
    given = dtypes(autocast_adapter_dtype=False)
    assert {name for name, dtype in given.items() if dtype == torch.bfloat16} == halves
    assert given == {n: t.dtype for n, t in ours.q.adapters["default"].state_dict().items()}


# --- merging


@EVERY
def test_merging_is_that_of_dk_merge_and_unmerging_is_exact(config):
    model, x = wrapped(config), inputs()
    before, y = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    reason = config.method_class.small().why_not_mergeable
    if reason is not None:
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                call()
        assert torch.equal(model(x), y)
        return
    ours = dk.adapt(net(), config.method_class.small(), ["q", "k"]).eval()
    for path, adapter in adapters(model).items():
        ours.get_submodule(path).adapters["default"].load_state_dict(adapter.state_dict())
    dk.remove(dk.merge(ours))
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), ours(x))
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(x), net()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), y)
    unloaded = model.merge_and_unload()
    assert type(unloaded.q) is type(unloaded.k) is nn.Linear
    assert torch.equal(unloaded(x), ours(x))


def test_what_would_not_be_finite_is_not_merged():
    model = wrapped(CONFIGS["TriLoRAConfig"])
    adapters(model)["q"].core.data[0] = float("nan")
    before = model.base_model.model.q.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.q.base_layer.weight, before)
    assert not model.base_model.model.q.merged


def test_accelerate_and_report_say_that_it_is_on_the_operator_already(recwarn):
    model = wrapped(CONFIGS["SSBConfig"])
    assert dk.accelerate(model) is model
    assert not [w for w in recwarn if "not accelerated" in str(w.message)]
    assert dk.report(model).count("on the operator, by register_with_peft") == 2


# --- several adapters


def two_adapters():
    config = CONFIGS["SSBConfig"]
    model = wrapped(config)
    model.add_adapter("other", made(config))
    perturb(model, "other")
    return model


def test_two_adapters_take_turns_and_the_active_one_trains():
    model, x = two_adapters(), inputs()

    def trained():
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {name.split("_adapters.")[1].split(".")[0] for name in names}

    first = model(x)
    assert trained() == {"default"}
    model.set_adapter("other")
    second = model(x)
    assert trained() == {"other"}
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("default")
    assert torch.equal(model(x), second)
    assert list(model.base_model.model.q.adapters) == ["other"]
    assert trained() == {"other"}


def test_two_adapters_at_once_are_refused_with_nothing_changed():
    model, x = two_adapters(), inputs()
    before = model(x)
    with pytest.raises(
        ValueError, match="one adapter can be active on a layer, got default, other"
    ):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter_names cannot be given with SSBTuner"):
        model(x, adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match="one adapter can be active"):
        model.merge_adapter(["default", "other"])
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="one adapter can be active"):
        model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert torch.equal(model(x), before)


def test_two_adapters_on_different_layers_work_together():
    config, x = CONFIGS["SSBConfig"], inputs()
    model = get_peft_model(net(), made(config, target_modules=["q"])).eval()
    model.add_adapter("other", made(config, target_modules=["k"]))
    nn.init.constant_(model.base_model.model.q.adapters["default"].out_scale, 2.0)
    nn.init.constant_(model.base_model.model.k.adapters["other"].out_scale, 3.0)
    model.base_model.set_adapter(["default", "other"])
    plain = net()
    plain.q.weight.data *= 2
    plain.k.weight.data *= 3
    torch.testing.assert_close(model(x), plain(x))


@EVERY
def test_copies_and_pickles_of_a_model_compute_the_same(config):
    model, x = wrapped(config), inputs()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        perturb(again)
        assert not torch.equal(again(x), model(x))


# --- what does not fit


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapped_layer_is_in_the_mode_that_the_layer_was_in(training):
    model = get_peft_model(net().train(training), made(CONFIGS["TriLoRAConfig"]))
    assert [m.training for m in model.base_model.model.q.modules()] == [training] * 4


def test_a_layer_that_refuses_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 2), "c": nn.Embedding(8, 8)})
    keys, modules = list(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=r"r must be at most .* = 2 for b with MiLoRA, got 4"):
        get_peft_model(model, CONFIGS["MiLoRAConfig"](r=4, target_modules=["a", "b"]))
    with pytest.raises(ValueError, match="c is a Embedding, and must be a plain nn.Linear"):
        get_peft_model(model, CONFIGS["MiLoRAConfig"](r=2, target_modules=["a", "c"]))
    assert (list(model.state_dict()), list(model.modules())) == (keys, modules)
    assert all(parameter.requires_grad for parameter in model.parameters())
    wrapped_model = get_peft_model(model, CONFIGS["MiLoRAConfig"](r=2, target_modules=["a"]))
    keys = list(wrapped_model.state_dict())
    with pytest.raises(ValueError, match="for b with MiLoRA"):
        wrapped_model.add_adapter("two", CONFIGS["MiLoRAConfig"](r=4, target_modules=["a", "b"]))
    assert list(wrapped_model.state_dict()) == keys
    assert list(wrapped_model.peft_config) == ["default"]


def test_an_adapter_made_on_the_meta_device_waits_for_its_values(tmp_path):
    trained = wrapped(CONFIGS["SVDiffConfig"])
    trained.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = Net().eval()
    model = get_peft_model(empty, made(CONFIGS["SVDiffConfig"]))
    model.base_model.model.load_state_dict(
        {k: v for k, v in trained.base_model.model.state_dict().items() if "dk_" not in k},
        strict=False, assign=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="made on the meta device and has no values"):
        model(inputs())
    weights = peft.load_peft_weights(tmp_path)
    peft.set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    assert torch.equal(model(inputs()), trained(inputs()))


# --- surroundings


def test_an_encoder_layer_s_fast_path_does_not_pass_the_adapter_by():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        plain = layer(x)
        model = get_peft_model(layer, CONFIGS["SSBConfig"](target_modules=["linear1"])).eval()
        torch.testing.assert_close(model(x), plain)
        nn.init.constant_(layer.linear1.adapters["default"].out_scale, 1.5)
        assert (model(x) - plain).abs().max() > 1e-2


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def test_a_language_model_with_gradient_checkpointing_has_the_same_gradients():
    tokens = torch.randint(40, (2, 7))

    def gradients(checkpointing):
        torch.manual_seed(4)
        model = get_peft_model(llama(), CONFIGS["FLoRAConfig"](r=4, task_type="CAUSAL_LM"))
        targets = {name.split(".dk_")[0].rpartition(".")[2] for name, p in
                   model.named_parameters() if p.requires_grad}  # fmt: skip
        assert targets == {"q_proj", "v_proj"}  # PEFT's choice for LoRA on Llama
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert len(plain) == 2 * 2 * 3
    for name, grad in plain.items():
        assert grad.abs().max() > 0
        assert torch.equal(again[name], grad), name


def test_gpt2_s_transposed_linears():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 8}
    torch.manual_seed(3)
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    tokens = torch.randint(30, (2, 5))
    plain = base(tokens).logits
    ours = dk.adapt(copy.deepcopy(base), dk.SVDiff(), ["c_attn"]).eval()
    model = get_peft_model(base, CONFIGS["SVDiffConfig"](target_modules=["c_attn"])).eval()
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    nn.init.normal_(layer.adapters["default"].delta)
    mine = ours.transformer.h[0].attn.c_attn
    mine.adapters["default"].load_state_dict(layer.adapters["default"].state_dict())
    y = model(tokens).logits
    assert torch.equal(y, ours(tokens).logits)
    assert (y - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    assert torch.equal(merged(tokens).logits, dk.merge(ours)(tokens).logits)
    torch.testing.assert_close(merged(tokens).logits, y, rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph():
    model = wrapped(CONFIGS["TriLoRAConfig"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), model(inputs()), rtol=0, atol=0)


# --- what belongs to single methods


def test_lora_dash_selects_its_directions_in_a_peft_model():
    model = wrapped(CONFIGS["LoRADashConfig"])
    assert not any(adapter.selected for adapter in adapters(model).values())
    lora_dash.select_directions(model)
    for adapter in adapters(model).values():
        assert adapter.selected and adapter.direction_up.abs().max() > 0
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged"):
        lora_dash.select_directions(model)


def test_diff_pruning_fixes_its_masks_in_a_peft_model():
    model = wrapped(CONFIGS["DiffPruningConfig"])
    assert diff_pruning.l0_penalty(model) > 0
    diff_pruning.fix_masks(model, density=0.1)
    y, plain = model(inputs()), net()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(inputs()), y, rtol=1e-4, atol=1e-5)
    assert (merged.q.weight != plain.q.weight).sum() == round(0.1 * 24 * 32)


def test_the_constraints_and_the_optimizer_s_groups_see_the_adapters():
    model = wrapped(CONFIGS["TriLoRAConfig"])
    ours = dk.adapt(net(), dk.TriLoRA.small(), ["q", "k"])
    for path, adapter in adapters(model).items():
        ours.get_submodule(path).adapters["default"].load_state_dict(adapter.state_dict())
    assert torch.equal(dk.mpc_loss(model), dk.mpc_loss(ours))

    def sizes(model):
        groups = dk.param_groups(model, 1e-3, loraplus_lr_ratio=16)
        return [(group["lr"], [tuple(p.shape) for p in group["params"]]) for group in groups]

    assert sizes(model) == sizes(ours)
    assert {lr for lr, _ in sizes(model)} == {1e-3, 16e-3}


def test_the_page_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/registering.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 1
    exec(compile(blocks[0], "docs/registering.md", "exec"), {"__name__": "__main__"})
    named = set(re.findall(r"`(\w+Config)`", page))
    assert named == set(CONFIGS)
