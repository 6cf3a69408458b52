"""transformers.Trainer on PEFT models under accelerate(): the same training, PEFT's own files."""

import re
import tempfile
import warnings
from typing import Any

import torch
from common import distance, frozen, llama, main, perturb, trained, unmoved
from harness import run
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import decomp_kernels as dk
from decomp_kernels.interop import trainers
from decomp_kernels.testing import assert_as_good_as

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def peft_model(seed: int = 0, **options: Any) -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)
    return get_peft_model(llama(seed), config)


def counts(model: nn.Module) -> dict[str, int]:
    """Layers whose every forward was fused, and the others, by dk.report."""
    lines = [line for line in dk.report(model).splitlines() if "accelerated" in line]
    fused = [line for line in lines if re.search(r": accelerated, [1-9]\d* fused$", line)]
    return {"fused": len(fused), "others": len(lines) - len(fused)}


def learning() -> dict[str, Any]:
    """Against PEFT's own float64 run, no worse than PEFT in float32: LoRA and DoRA."""
    found: dict[str, Any] = {}
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 6, "gradient_accumulation_steps": 2}
    for name, options in (("lora", {}), ("dora", {"use_dora": True})):
        model = dk.accelerate(perturb(peft_model(**options)))
        before, base = trained(model), frozen(model)
        _, losses = run(model, [trainers.CheckGradientsCallback()], **sgd)
        plain = perturb(peft_model(**options))
        _, theirs = run(plain, **sgd)
        exact = perturb(peft_model(**options)).double()
        run(exact, **sgd)
        wide = trained(exact)
        for key, value in trained(model).items():
            assert_as_good_as(value, trained(plain)[key], wide[key], key)
        found[name] = {
            **counts(model),
            "losses": losses,
            "theirs": theirs,
            "unmoved": unmoved(before, trained(model)),
            "base_changed": distance(base, frozen(model)),
        }
    return found


def resumed() -> dict[str, Any]:
    """With dropout, activation checkpointing both ways, and PEFT's adapter-only checkpoints."""
    found: dict[str, Any] = {}
    for name, kwargs in (("reentrant", True), ("not", False)):
        options = {
            "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": kwargs},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            whole = dk.accelerate(perturb(peft_model(lora_dropout=0.1)))
            _, losses = run(whole, folder=folder, **options)
            again = dk.accelerate(peft_model(lora_dropout=0.1))
            _, more = run(again, resume=f"{folder}/checkpoint-3", folder=folder, **options)
            plain = PeftModel.from_pretrained(llama(), f"{folder}/checkpoint-6").eval()
            x = torch.arange(3, 15)[None]
            y = dk.restore(again).eval()(x).logits
            found[name] = {
                **counts(whole),
                "adapter": distance(trained(whole), trained(again)),
                "losses": [losses[3:], more],
                "loaded": (plain(x).logits - y).abs().max().item(),
                "moved": (llama().eval()(x).logits - y).abs().max().item(),
            }
    without = dk.accelerate(perturb(peft_model(lora_dropout=0.1)))
    run(without, gradient_accumulation_steps=2)
    found["without_checkpointing"] = distance(trained(whole), trained(without))
    return found


def autocast() -> dict[str, Any]:
    """bf16=True, and against PEFT's float64 run no worse than PEFT under autocast."""
    sgd = {"optim": "sgd", "learning_rate": 0.5}
    model, plain = dk.accelerate(perturb(peft_model())), perturb(peft_model())
    exact = perturb(peft_model()).double()
    before = trained(model)
    run(model, bf16=True, **sgd)
    run(plain, bf16=True, **sgd)
    run(exact, **sgd)
    ours, theirs, wide = trained(model), trained(plain), trained(exact)
    for key, value in ours.items():
        assert_as_good_as(value - before[key], theirs[key] - before[key],
                          wide[key] - before[key].double(), key, torch.bfloat16)  # fmt: skip
    return {"apart": distance(ours, theirs), "moved": distance(before, ours), **counts(model)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"learning": learning, "resumed": resumed, "autocast": autocast})
