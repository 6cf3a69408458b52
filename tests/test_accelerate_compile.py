"""accelerate under torch.compile: no graph break and no recompilation, where PEFT's DoRA breaks."""

import copy

import peft
import pytest
import torch
from peft_models import calls, moved
from torch._dynamo.testing import AotEagerAndRecordGraphs
from transformers import LlamaConfig, LlamaForCausalLM

import decomp_kernels as dk
from decomp_kernels.testing import relative_error

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.05, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def llama(name):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return moved(peft.get_peft_model(LlamaForCausalLM(config), copy.deepcopy(CONFIGS[name])))


def train(model, run, ids, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)  # of the masks
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    ("name", "seen"), [("lora", False), ("dora", False), ("dora", True), ("ia3", False)]
)
def test_a_llama_is_one_graph_and_compiled_once(name, seen):
    ids = torch.randint(64, (2, 16))
    eager = dk.accelerate(llama(name)).train()
    model = copy.deepcopy(eager)
    if seen:  # in eager, so that DoRA has ||W||^2
        model(ids)
    before = calls(model)
    torch._dynamo.reset()
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(model, fullgraph=True, backend=recorded)
    losses = train(model, compiled, ids), train(eager, eager, ids)
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1]
    for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert relative_error(q, p) < 1e-5, key
    (graph,) = recorded.fw_graphs  # of three steps: nothing was compiled twice
    ops = [str(node.target) for node in graph.graph.nodes]
    products = sum("decomposed_linear_fwd" in op for op in ops)
    per_layer = 2 if name == "dora" else 1  # the rows that dropout took from the base product
    assert products == per_layer * len(TARGETS)
    assert calls(model) == before  # compiled forwards are not counted
    torch._dynamo.reset()


def test_pefts_own_dora_breaks_the_graph_and_ours_does_not():
    ids = torch.randint(64, (1, 8))
    model = llama("dora").train()
    theirs = torch._dynamo.explain(model)(ids)
    torch._dynamo.reset()
    ours = torch._dynamo.explain(dk.accelerate(model))(ids)
    torch._dynamo.reset()
    assert theirs.graph_break_count >= len(TARGETS)
    assert ours.graph_break_count == 0


def test_compiled_dora_follows_a_base_weight_that_changes_after_an_eager_forward():
    model = dk.accelerate(llama("dora")).eval()
    ids = torch.randint(64, (1, 8))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(ids), compiled(ids)
        for name, parameter in model.named_parameters():
            if "base_layer.weight" in name:
                parameter.mul_(2)
        assert relative_error(compiled(ids).logits, model(ids).logits) < 1e-6
    torch._dynamo.reset()


def test_what_falls_back_compiles_too():
    model = dk.accelerate(llama("lora")).eval()
    ids = torch.randint(64, (1, 8))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        adapted = compiled(ids).logits
        with model.disable_adapter():
            base, expected = compiled(ids).logits, model(ids).logits
        assert relative_error(base, expected) < 1e-6
        assert relative_error(adapted, expected) > 1e-3
        assert relative_error(adapted, model(ids).logits) < 1e-6
    torch._dynamo.reset()
