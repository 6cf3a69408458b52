"""``plan`` against what small real models hold: parameters, optimizer state, saved, shards."""

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

import decomp_kernels as dk
from decomp_kernels.cli.main import main
from decomp_kernels.cli.unloaded import unloaded
from decomp_kernels.planning import plan

transformers = pytest.importorskip("transformers")

ROWS, TOKENS = 2, 48
FP32, BF16 = torch.float32, torch.bfloat16


def llama(**changes):
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 256,
        "max_position_embeddings": 64, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    return transformers.LlamaConfig(**sizes | changes)


def bert():
    """An encoder, with the base's own dropout but that of attention, which no kernel stores."""
    return transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        vocab_size=200, max_position_embeddings=64, architectures=["BertModel"],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def gpt2():
    """Linears that are Conv1D, and a head that is tied to the embedding."""
    return transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=200, n_positions=64, attn_pdrop=0.0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip


def phi3():
    """One linear for q, k and v, and a q that lies in memory by heads: so does what comes of it."""
    return transformers.Phi3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=128, max_position_embeddings=64, pad_token_id=0,
        architectures=["Phi3ForCausalLM"],
    )  # fmt: skip


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "phi3": phi3}
METHODS = {
    "lora": dk.LoRA(r=4),
    "lora-dropout": dk.LoRA(r=4, dropout=0.1),
    "dora": dk.DoRA(r=4),
    "dora-dropout": dk.DoRA(r=4, dropout=0.1, dropout_mode="peft"),
    "ssb": dk.SSB(),
    "ia3": dk.IA3(),
}


def pointers(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


def whole(tensors):
    """Bytes of all storages, each once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def keeping(call):
    """(the tensors that autograd saved, held, and the result of the call)."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        result = call()
    return packed, result


class Real:
    """The same model with values, on the CPU."""

    def __init__(self, config, method, dtype=FP32, float32_adapter=True):
        torch.manual_seed(0)
        language = config.architectures[0] != "BertModel"
        auto = transformers.AutoModelForCausalLM if language else transformers.AutoModel
        config.use_cache = False
        self.model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
        dk.adapt(self.model, method, autocast_adapter_dtype=float32_adapter)
        self.model.train()
        self.inputs = {"input_ids": torch.randint(0, config.vocab_size, (ROWS, TOKENS))}
        if language:
            self.inputs["labels"] = self.inputs["input_ids"]

    def loss(self):
        """Of an encoder, one that keeps nothing itself."""
        out = self.model(**self.inputs)
        if "labels" in self.inputs:
            return out.loss
        return out.last_hidden_state[..., 0].sum() + out.pooler_output.sum()

    def saved(self):
        """Bytes of the storages that a forward keeps, but for parameters and buffers."""
        known = pointers([*self.model.parameters(), *self.model.buffers()])
        packed, loss = keeping(self.loss)
        assert loss.requires_grad
        return whole(t for t in packed if t.untyped_storage().data_ptr() not in known)

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def planned(config, method, dtype=FP32, **options):
    made = unloaded(config, dtype, ROWS, TOKENS)
    return plan(made.model, method, made.forward, made.blocks, **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_is_what_a_real_step_holds(model, name):
    """Every figure to the byte in float32: parameters, gradients, AdamW's state, saved storages."""
    real, found = Real(MODELS[model](), METHODS[name]), planned(MODELS[model](), METHODS[name])
    assert real.saved() == found.saved.kept > 0
    trained = real.trained()
    before = [p.clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    real.loss().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in trained)
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    state = [t for p in trained for name, t in optimizer.state[p].items() if name != "step"]
    held = whole([*real.model.parameters(), *real.model.buffers()])
    gradients = [p.grad for p in trained]
    assert found.trainable == sum(p.numel() for p in trained) > 0
    assert found.base + found.adapters == held
    assert found.gradients == whole(gradients)
    assert found.optimizer == whole(state)
    assert found.whole() == (held + whole(gradients) + whole(state) + found.saved.kept)


@pytest.mark.parametrize("name", sorted(dk.methods()))
def test_every_method_keeps_what_is_planned(name):
    method = dk.methods()[name].small()
    real, found = Real(llama(), method), planned(llama(), method)
    assert found.saved.kept == real.saved()
    assert found.trainable == sum(p.numel() for p in real.trained())
    assert found.base + found.adapters == whole([*real.model.parameters(), *real.model.buffers()])


@pytest.mark.parametrize("float32_adapter", [True, False], ids=["float32", "narrow"])
@pytest.mark.parametrize("name", ["lora", "dora", "ssb"])
@pytest.mark.parametrize("model", MODELS)
def test_in_bf16_within_a_hundredth(model, name, float32_adapter):
    """A CPU keeps LayerNorm's statistics in bf16; a GPU, and shapes alone, in float32."""
    options = {"dtype": BF16, "float32_adapter": float32_adapter}
    real = Real(MODELS[model](), METHODS[name], **options)
    found = planned(MODELS[model](), METHODS[name], **options)
    assert found.saved.kept == pytest.approx(real.saved(), rel=0.01)
    assert found.gradients == sum(p.nbytes for p in real.trained())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("name", ["lora-dropout", "dora", "ssb"])
@pytest.mark.parametrize("model", MODELS)
def test_checkpointed_blocks(model, name):
    """transformers' own checkpointing, and the largest block computed by itself."""
    found = planned(MODELS[model](), METHODS[name]).saved
    real = Real(MODELS[model](), METHODS[name])
    calls = {}
    blocks = [
        module
        for module in real.model.modules()
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer)
    ]
    assert len(blocks) >= 2
    for block in blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: calls.update({block: (args, kwargs)}), with_kwargs=True
        )
    plain = real.saved()
    alone = []
    for block, (args, kwargs) in calls.items():
        rotary = kwargs.get("position_embeddings") or ()
        given = pointers([*rotary, *real.model.parameters(), *filter(torch.is_tensor, args)])
        packed, _ = keeping(lambda block=block, args=args, kwargs=kwargs: block(*args, **kwargs))
        alone.append(whole(t for t in packed if t.untyped_storage().data_ptr() not in given))
    assert found.one_block == max(alone)

    real.model.gradient_checkpointing_enable({"use_reentrant": False})
    # Or else embeddings are given a gradient, which only reentrant checkpointing needs.
    real.model.disable_input_require_grads()
    passed = [t for _, kwargs in calls.values() for t in tree_leaves(kwargs) if torch.is_tensor(t)]
    # Of keywords, such as cos and sin, a closure takes hold: no hook sees those.
    assert found.until_backward == real.saved() + whole(passed)
    assert found.held(checkpointed=True) < plain


@pytest.mark.parametrize("gpus", [2, 3, 8, 64])
def test_shards_are_fsdp2s(gpus):
    """What fully_shard leaves on the first of ``gpus`` ranks, which a fake process group has."""
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole_blocks = {}
    made = unloaded(llama(), FP32, ROWS, TOKENS)
    dk.adapt(made.model, METHODS["dora"])
    root = sum(p.nbytes for n, p in made.model.named_parameters() if ".layers." not in n)
    for number, block in enumerate(made.blocks):
        whole_blocks[number] = sum(p.nbytes for p in block.parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        for block in made.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(made.model, mesh=mesh)
        local = {p: p.to_local().nbytes for p in made.model.parameters()}
    finally:
        dist.destroy_process_group()
    trained = sum(size for p, size in local.items() if p.requires_grad)
    buffers = sum(b.nbytes for b in made.model.buffers())
    found = planned(llama(), METHODS["dora"], gpus=[gpus]).shards[gpus]
    # AdamW has two tensors beside each gradient.
    expected = sum(local.values()) + 3 * trained + buffers + root + max(whole_blocks.values())
    assert found == expected
    assert 0 < trained < sum(local.values())


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_quantised_bytes_are_bitsandbytes(quantized):
    bnb = pytest.importorskip("bitsandbytes")
    dense = planned(llama(), METHODS["lora"], BF16)
    found = planned(llama(), METHODS["lora"], BF16, quantized=quantized)
    made = unloaded(llama(), BF16, ROWS, TOKENS)
    saved = 0
    for name, module in made.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = torch.randn(module.weight.shape, dtype=BF16)
            if quantized == "nf4":
                codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
                kept = (codes, state.absmax)
            else:
                codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
                kept = (codes, scales)
            saved += weight.nbytes - sum(t.nbytes for t in kept)
    assert dense.base - found.base == saved > 0
    assert found.saved == dense.saved
    assert found.gradients == dense.gradients


def test_what_plan_refuses():
    with pytest.raises(ValueError, match="meta device"):
        plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), dk.LoRA(r=2), lambda model: None)
    for option in ("quantized", "optimizer"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'fp5'"):
            planned(llama(), METHODS["lora"], **{option: "fp5"})


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path)
    return tmp_path


def printed(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


SIZES = ("--batch-size", ROWS, "--sequence-length", TOKENS, "--dtype", "float32")


@pytest.mark.parametrize("file", ["", "config.json"], ids=["folder", "file"])
def test_command_as_json(capsys, folder, file):
    text = printed(
        capsys, "--model", folder / file, "--method", "lora,dora", "-O", "r=4", *SIZES, "--json",
        "--gpus", "8", "--checkpointing", "block", "--optimizer", "sgd",
    )  # fmt: skip
    shown = json.loads(text)["plans"]
    for name, method in (("lora r=4", dk.LoRA(r=4)), ("dora r=4", dk.DoRA(r=4))):
        found = planned(llama(), method, gpus=[8], optimizer="sgd")
        assert shown[name]["saved"] == found.saved._asdict()
        assert shown[name]["optimizer"] == 0
        assert shown[name]["per_gpu"] == {
            "DDP": found.whole(checkpointed=True),
            "FSDP2 8": found.sharded(8, checkpointed=True),
        }


def test_command_as_text(capsys, folder):
    text = printed(capsys, "--model", folder, "--method", "ssb", *SIZES, "--memory", "80")
    found = planned(llama(), dk.SSB())
    assert f"{found.parameters:,} parameters in float32" in text
    assert "2 rows of 48 tokens a GPU" in text
    assert f" {found.trainable:,} " in text
    assert "FSDP2 64 GPUs" in text
    assert "Left out" in text
    (line,) = [line for line in text.splitlines() if line.startswith("ssb") and "*" in line]
    assert line.count("*") == 4
    small = printed(capsys, "--model", folder, "--method", "ssb", *SIZES, "--memory", "0.0001")
    assert small.count("*") == 1  # the legend's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9b"], "must be one of llama-8b, llama-70b"),
        (["--model", "./nowhere"], "found no folder ./nowhere"),
        (["--method", "loraa"], "unknown method 'loraa'"),
        (["--method", "lora", "-O", "rank=3"], "LoRA has no option 'rank'"),
        (["--method", "lora", "-O", "r=0"], "r must be at least 1"),
        (["--target-modules", "nothing"], "matches no module"),
        (["--sequence-length", "65"], "at most the model's 64, got 65"),
    ],
)
def test_command_on_bad_input(capsys, folder, arguments, message):
    given = arguments if "--model" in arguments else ["--model", str(folder), *arguments]
    if "--sequence-length" not in given:
        given = [*given, "--sequence-length", "8"]
    assert main(["plan", *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpus", "0"], ["--gpus", "1,x"], ["--gpus", "²"], ["--batch-size", "0"],
        ["--memory", "-1"], ["--memory", "many"], ["--quantized", "fp5"], ["-O", "r=4"],
    ],
)  # fmt: skip
def test_command_on_wrong_numbers(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert "must be" in (said := capsys.readouterr().err) or "must come" in said or "choose" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "must name the class"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"num_attention_heads": 0}, "cannot"),
        ("{", "cannot read"),
    ],
)
def test_command_on_a_broken_configuration(capsys, folder, changes, message):
    path = folder / "config.json"
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(path.read_text()) | changes)
    path.write_text(changes)
    assert main(["plan", "--model", str(folder), *map(str, SIZES)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


REFUSED = {
    "T5": ({}, "ForConditionalGeneration", "an encoder and a decoder"),
    "Falcon": (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "ForCausalLM",
        "none of transformers' AttentionInterface",
    ),
    "ViT": (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "Model",
        "ViTModel cannot run on token ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_command_says_which_models_it_cannot_run(capsys, tmp_path, name):
    sizes, kind, message = REFUSED[name]
    config = getattr(transformers, f"{name}Config")
    config(architectures=[f"{name}{kind}"], **sizes).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--sequence-length", "8"]) == 2
    assert message in capsys.readouterr().err
