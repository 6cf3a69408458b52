"""TRL's SFTTrainer on a model from adapt(), with a tokenizer made here."""

import re
import tempfile
import warnings
from typing import Any

import torch
from common import VOCABULARY, adapted, distance, frozen, llama, main, trained, unmoved
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import decomp_kernels as dk
from decomp_kernels.interop import trainers


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentences(count: int = 64) -> Dataset:
    start = torch.randint(VOCABULARY - 3, (count,), generator=torch.Generator().manual_seed(1))
    text = [" ".join(f"w{(s + i) % (VOCABULARY - 3)}" for i in range(10)) for s in start.tolist()]
    return Dataset.from_dict({"text": text})


def make(model: nn.Module, callbacks: Any = (), peft_config: Any = None, **options: Any) -> Any:
    settings = {
        "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_length": 16,
        "bf16": False, "output_dir": tempfile.gettempdir(), **options,
    }  # fmt: skip
    return SFTTrainer(
        model, SFTConfig(**settings), train_dataset=sentences(), processing_class=tokenizer(),
        callbacks=list(callbacks), peft_config=peft_config,
    )  # fmt: skip


def run(model: nn.Module, callbacks: Any = (), resume: str | None = None, **options: Any) -> Any:
    trainer = make(model, callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learning() -> dict[str, Any]:
    """As SFTConfig has it: activation checkpointing on; and bf16, which is its default, too."""
    found: dict[str, Any] = {}
    for name, options in (("float32", {}), ("bf16", {"bf16": True})):
        model = dk.adapt(llama(), dk.LoRA(r=8, alpha=16, dropout=0.1), modules_to_save=["lm_head"])
        before, base = trained(model), frozen(model)
        callbacks = [trainers.CheckGradientsCallback(), trainers.MPCLossCallback("d", 0.01)]
        trainer = run(model, callbacks, **options)
        found[name] = {
            "losses": losses(trainer),
            "checkpointing": trainer.args.gradient_checkpointing,
            "unmoved": unmoved(before, trained(model)),
            "trained": len(before),
            "base_changed": distance(base, frozen(model)),
        }
    return found


def resumed() -> dict[str, Any]:
    """AdaLoRA with its allocator: 6 steps at once against 3 and 3 more in a new model."""
    method = dk.AdaLoRA(r=4, target_r=2, alpha=8, dropout=0.1, tinit=1, tfinal=1)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": folder,
            "gradient_accumulation_steps": 2,
        }  # fmt: skip
        whole, again = adapted(method), adapted(method, seed=5)
        first = run(whole, [trainers.RankAllocatorCallback()], **options)
        rest = run(again, [trainers.RankAllocatorCallback()], f"{folder}/checkpoint-3", **options)
    return {
        "adapter": distance(trained(whole), trained(again)),
        "losses": [losses(first), losses(rest)],
        "another_start": distance(trained(whole), trained(adapted(method, seed=5))),
    }


def accelerated() -> dict[str, Any]:
    """A PeftModel under accelerate(), and one that SFTTrainer makes itself, accelerated after."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "up_proj"])
    found: dict[str, Any] = {}
    for name in ("given", "made"):
        model: Any = llama() if name == "made" else dk.accelerate(get_peft_model(llama(), config))
        trainer = make(model, peft_config=config if name == "made" else None)
        model = dk.accelerate(trainer.model)
        before, base = trained(model), frozen(model)
        trainer.train()
        lines = [line for line in dk.report(model).splitlines() if "accelerated" in line]
        found[name] = {
            "losses": losses(trainer),
            "fused": sum(bool(re.search(r"accelerated, [1-9]\d* fused$", s)) for s in lines),
            "layers": len(lines),
            "unmoved": unmoved(before, trained(model)),
            "base_changed": distance(base, frozen(model)),
        }
    return found


def head() -> dict[str, Any]:
    """SFTTrainer reads lm_head.weight: a trained copy of it learns, an adapter on it cannot."""
    model = dk.adapt(llama(), dk.LoRA(r=4, alpha=8), modules_to_save=["lm_head"])
    before = trained(model)
    run(model, [trainers.CheckGradientsCallback()], max_steps=2)
    found: dict[str, Any] = {"copy_unmoved": unmoved(before, trained(model))}

    targets = ["q_proj", "lm_head"]
    model = dk.adapt(llama(), dk.LoRA(r=4, alpha=8), target_modules=targets)
    before = trained(model)
    run(model, max_steps=2)
    found["adapter_unmoved"] = unmoved(before, trained(model))
    try:
        model = dk.adapt(llama(), dk.LoRA(r=4, alpha=8), target_modules=targets)
        check = trainers.CheckGradientsCallback()  # sees that MPC's gradient is not the task's
        run(model, [trainers.MPCLossCallback("d", 0.01), check], max_steps=2)
        found["said"] = ""
    except RuntimeError as error:
        found["said"] = str(error)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"learning": learning, "resumed": resumed, "head": head, "accelerated": accelerated})
