"""A Trainer on the tiny Llama, and the same training as a loop."""

import tempfile
from typing import Any

import torch
from common import batch, data
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import decomp_kernels as dk
from decomp_kernels.methods.adalora import RankAllocator
from decomp_kernels.methods.lora_dash import select_directions

ADALORA = dk.AdaLoRA(r=4, target_r=2, alpha=8, dropout=0.1, tinit=1, tfinal=2, deltaT=2)
CONSTRAINT = {"kind": "o", "coef": 0.05}


class Losses(TrainerCallback):
    """What the Trainer logs, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.seen.append(logs["loss"])


def run(
    model: nn.Module,
    callbacks: Any = (),
    resume: str | None = None,
    folder: str = "",
    **options: Any,
) -> tuple[Trainer, list[float]]:
    """A Trainer over the data in its order, with AdamW at a constant rate, and its losses."""
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential", **options,
    }  # fmt: skip
    losses = Losses()
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(folder or scratch, **settings)
        trainer = Trainer(
            model, args, train_dataset=data(), callbacks=[losses, *callbacks], eval_dataset=data(8)
        )
        trainer.train(resume_from_checkpoint=resume)
    return trainer, losses.seen


def loop(
    model: nn.Module, steps: int, *, rows: int = 4, accumulate: int = 1, clip: float = 1.0,
    constraint: dict[str, Any] | None = None, allocator: RankAllocator | None = None,
    select_after: int | None = None,
) -> None:  # fmt: skip
    """The same without the Trainer: loss + mpc_loss, clipped, the companions as they document."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    all_rows = data()
    torch.manual_seed(3)
    for step in range(steps):
        if step == select_after:
            select_directions(model)
        for micro in range(accumulate):
            first = (step * accumulate + micro) * rows % len(all_rows)
            loss = model(**batch(all_rows[first : first + rows])).loss / accumulate
            if constraint is not None:
                loss = loss + dk.mpc_loss(model, **constraint) / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if allocator is not None:
            allocator.step(model, step + 1)
        optimizer.zero_grad()


def has_core(module: nn.Module) -> bool:
    """Whether it is the adapter of a method with a core."""
    return hasattr(module, "method") and hasattr(module, "core")
