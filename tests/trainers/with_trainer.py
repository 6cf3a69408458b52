"""transformers.Trainer on models from adapt(): learning, resuming, saving, and the callbacks."""

import re
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import adapted, batch, data, distance, frozen, llama, main, perturb, trained, unmoved
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import decomp_kernels as dk
from decomp_kernels.interop import trainers
from decomp_kernels.methods.adalora import RankAllocator
from decomp_kernels.methods.lora_dash import select_directions

ADALORA = dk.AdaLoRA(r=4, target_r=2, alpha=8, dropout=0.1, tinit=1, tfinal=2, deltaT=2)
SAVED_ONCE = re.compile(r"^lm_head\.weight$|\.shared_(down|up)$")  # of tensors with two names
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


def learning() -> dict[str, Any]:
    model = dk.adapt(llama(), dk.LoRA(r=8, alpha=16, dropout=0.1), modules_to_save=["lm_head"])
    before, base = trained(model), frozen(model)
    callbacks = [trainers.CheckGradientsCallback()]
    _, losses = run(model, callbacks, max_steps=30, gradient_accumulation_steps=2,
                    learning_rate=2e-2)  # fmt: skip
    return {
        "losses": losses,
        "unmoved": unmoved(before, trained(model)),
        "trained": len(before),
        "base_changed": distance(base, frozen(model)),
    }


def resumed() -> dict[str, Any]:
    """6 steps at once against 3 and 3 more in a new model: LoRA with dropout, and AdaLoRA."""
    found: dict[str, Any] = {}
    for name, method in (("lora", None), ("adalora", ADALORA)):

        def callbacks(name: str = name) -> list[Any]:
            own = [trainers.RankAllocatorCallback()] if name == "adalora" else []
            return [*own, trainers.MPCLossCallback(**CONSTRAINT)]

        options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
        with tempfile.TemporaryDirectory() as folder:
            whole = perturb(adapted(method))
            _, losses = run(whole, callbacks(), folder=folder, **options)
            checkpoint = f"{folder}/checkpoint-3"
            again = adapted(method, seed=5)  # another start: everything comes from the files
            _, more = run(again, callbacks(), checkpoint, folder, **options)
            restored = adapted(method, seed=5)
            flag = {"restore_callback_states_from_checkpoint": True}
            run(restored, callbacks(), checkpoint, folder, **options, **flag)
            found[name] = {
                "adapter": distance(trained(whole), trained(again)),
                "with_the_trainers_own_restoring": distance(trained(whole), trained(restored)),
                "losses": [losses[3:], more],
                "another_start": distance(trained(whole), trained(adapted(method, seed=5))),
            }
            if name == "adalora":
                ranks = [m.core.count_nonzero().item() for m in again.modules() if _adapter(m)]
                found[name]["ranks"] = ranks
                forgotten = adapted(method, seed=5)
                try:  # without the allocator's state there is no going on
                    state = Path(checkpoint) / "trainer_state.json"
                    text = state.read_text()
                    state.write_text(text.replace('"RankAllocatorCallback"', '"Another"'))
                    run(forgotten, callbacks(), checkpoint, folder, **options)
                except ValueError as error:
                    found[name]["without"] = str(error)
    return found


def _adapter(module: nn.Module) -> bool:
    return hasattr(module, "method") and hasattr(module, "core")


def checkpointing() -> dict[str, Any]:
    """Activation checkpointing, with dropout on, trains the same adapter."""
    ends: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Any] = {}
    for name, options in (
        ("none", {}),
        ("reentrant", {"use_reentrant": True}),
        ("not", {"use_reentrant": False}),
    ):
        model = adapted()
        keys = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}
        run(model, [trainers.CheckGradientsCallback()], max_steps=3, **(keys if options else {}))
        ends[name] = trained(model)
        found[f"{name}_checkpointed"] = model.model.layers[0].gradient_checkpointing
    without_dropout = adapted(dk.LoRA(r=4, alpha=8))
    run(without_dropout, max_steps=3)
    found["dropout_matters"] = distance(ends["none"], trained(without_dropout))
    found["reentrant"] = distance(ends["none"], ends["reentrant"])
    found["not"] = distance(ends["none"], ends["not"])
    return found


def silent() -> dict[str, Any]:
    """Reentrant, with inputs that need no gradient and a trained head: the layers learn nothing."""

    def broken() -> nn.Module:
        model = dk.adapt(llama(), dk.LoRA(r=4, alpha=8), modules_to_save=["lm_head"])
        model.enable_input_require_grads = lambda: None  # as models without text inputs have it
        return model

    options = {
        "max_steps": 2, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }  # fmt: skip
    model = broken()
    before = trained(model)
    run(model, **options)
    stuck = unmoved(before, trained(model))
    try:
        run(broken(), [trainers.CheckGradientsCallback()], **options)
        said = ""
    except RuntimeError as error:
        said = str(error)
    return {"stuck": len(stuck), "trained": len(before), "said": said}


def accumulation() -> dict[str, Any]:
    ends = []
    for rows, times in ((8, 1), (2, 4)):
        model = perturb(adapted(dk.LoRA(r=4, alpha=8)))
        start = trained(model)
        run(model, max_steps=4, per_device_train_batch_size=rows,
            gradient_accumulation_steps=times)  # fmt: skip
        ends.append(trained(model))
    return {"difference": distance(*ends), "moved": distance(start, ends[0])}


def autocast() -> dict[str, Any]:
    """bf16=True: adapted layers answer in bf16, gradients and weights stay float32."""
    ends = []
    dtypes = set()

    def saw(_: Any, __: Any, output: Tensor) -> None:
        dtypes.add(str(output.dtype))

    for bf16 in (True, False):
        model = perturb(adapted(dk.LoRA(r=4, alpha=8)))
        start = trained(model)
        if bf16:
            model.model.layers[0].mlp.up_proj.register_forward_hook(saw)
        run(model, bf16=bf16, max_steps=4)
        ends.append(trained(model))
    by_hand = perturb(adapted(dk.LoRA(r=4, alpha=8)))
    with torch.autocast("cpu", torch.bfloat16):
        loop(by_hand, 4)
    return {
        "dtypes": sorted(dtypes),
        "kept": sorted({str(t.dtype) for t in ends[0].values()}),
        "against_a_loop": distance(ends[0], trained(by_hand)),
        "against_float32": distance(*ends),
        "unmoved": unmoved(start, ends[0]),
    }


def allocator() -> dict[str, Any]:
    method = replace(ADALORA, dropout=0.0)  # masks are drawn after other random numbers there
    callback = trainers.RankAllocatorCallback()
    model = perturb(adapted(method))
    run(model, [callback, trainers.MPCLossCallback(**CONSTRAINT)], max_steps=8)
    by_hand, without = perturb(adapted(method)), perturb(adapted(method))
    own = RankAllocator(method, 8)
    loop(by_hand, 8, constraint=CONSTRAINT, allocator=own)
    loop(without, 8, constraint=CONSTRAINT)
    try:
        run(adapted(method), [callback], max_steps=3)
        said = ""
    except ValueError as error:
        said = str(error)
    return {
        "difference": distance(trained(model), trained(by_hand)),
        "without": distance(trained(model), trained(without)),
        "ranks": sorted(callback.allocator.ranks().values()),
        "same_ranks": callback.allocator.ranks() == own.ranks(),
        "said": said,
    }


def directions() -> dict[str, Any]:
    method = dk.LoRADash(r=4, alpha=8, n_directions=3)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = adapted(method)
        options = {"folder": folder, "save_strategy": "steps", "save_steps": 2}
        run(model, [trainers.SelectDirectionsCallback(4)], **options)
        for step in (2, 4):
            tensors = load_file(f"{folder}/checkpoint-{step}/model.safetensors")
            selected = {bool(t) for name, t in tensors.items() if name.endswith("selected")}
            found[f"selected_at_{step}"] = sorted(selected)
        for step in (2, 4):  # before and after the choice
            again = adapted(method, seed=5)
            run(again, [trainers.SelectDirectionsCallback(4)],
                f"{folder}/checkpoint-{step}", **options)  # fmt: skip
            found[f"resumed_at_{step}"] = distance(trained(model), trained(again))
    by_hand = adapted(method)
    loop(by_hand, 6, select_after=4)
    found["difference"] = distance(trained(model), trained(by_hand))
    cores = [m.core for m in model.modules() if _adapter(m)]
    found["directions_trained"] = all(core.abs().min() > 0 for core in cores)
    found["said"] = []
    for bad, after in ((adapted(method), 6), (adapted(), 4)):
        try:
            run(bad, [trainers.SelectDirectionsCallback(after)])
        except ValueError as error:
            found["said"].append(str(error))
    return found


def mpc() -> dict[str, Any]:
    """With clipping at work and accumulation: the same as the sum of the losses in a loop."""
    ends = {}
    for name, callbacks in (("with", [trainers.MPCLossCallback(**CONSTRAINT)]), ("without", [])):
        model = perturb(adapted(dk.LoRA(r=4, alpha=8)))
        run(model, callbacks, max_steps=5, gradient_accumulation_steps=2, max_grad_norm=0.05)
        ends[name] = trained(model)
    by_hand = perturb(adapted(dk.LoRA(r=4, alpha=8)))
    loop(by_hand, 5, accumulate=2, clip=0.05, constraint=CONSTRAINT)
    try:
        run(adapted(dk.SSB()), [trainers.MPCLossCallback(**CONSTRAINT)])
        said = ""
    except ValueError as error:
        said = str(error)
    return {
        "difference": distance(ends["with"], trained(by_hand)),
        "without": distance(ends["without"], trained(by_hand)),
        "said": said,
    }


def saving() -> dict[str, Any]:
    """Tied embeddings, a trained head's copy, VeRA's shared tensors; the best model at the end."""
    found: dict[str, Any] = {}
    sample = batch(data(2))
    for name, options, adapt in (
        ("lora", {}, {"method": dk.LoRA(r=4, alpha=8)}),
        ("tied", {"tie_word_embeddings": True}, {"method": dk.DoRA(r=4, alpha=8)}),
        ("vera", {}, {"method": dk.VeRA(r=4)}),
        ("head", {}, {"method": dk.SSB(), "modules_to_save": ["lm_head"]}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            model = perturb(dk.adapt(llama(**options), **adapt))
            plain = llama(**options).eval()(**sample).logits
            settings = {
                "folder": folder, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2,
                "eval_strategy": "steps", "load_best_model_at_end": True, "learning_rate": 0.5,
            }  # fmt: skip
            trainer, _ = run(model, [trainers.SaveAdapterCallback()], **settings)
            model.eval()
            y = model(**sample).logits
            best = trainer.state.best_model_checkpoint
            trainer.save_model(f"{folder}/final")
            weights = load_file(f"{folder}/final/model.safetensors")
            kept = type(model).from_pretrained(f"{folder}/final").eval()
            again = dk.adapt(llama(seed=5, **options), **adapt).eval()
            left = again.load_state_dict(weights, strict=False)
            loaded = dk.load_adapter(llama(**options), f"{folder}/adapter").eval()
            at_best = dk.load_adapter(llama(**options), f"{best}/adapter").eval()
            at_end = dk.load_adapter(llama(**options), f"{folder}/checkpoint-6/adapter").eval()
            found[name] = {
                "best": Path(best).name,
                "moved": (y - plain).abs().max().item(),
                "whole": (again(**sample).logits - y).abs().max().item(),
                "base": (kept(**sample).logits - plain).abs().max().item(),
                "unexpected": left.unexpected_keys,
                "missing": [key for key in left.missing_keys if not SAVED_ONCE.search(key)],
                "adapter": (loaded(**sample).logits - y).abs().max().item(),
                "best_adapter": (at_best(**sample).logits - y).abs().max().item(),
                "last_adapter": (at_end(**sample).logits - y).abs().max().item(),
                "bytes": [
                    sum(f.stat().st_size for f in Path(folder, "adapter").iterdir()),
                    Path(folder, "final", "model.safetensors").stat().st_size,
                ],
            }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    main({
        "learning": learning, "resumed": resumed, "checkpointing": checkpointing, "silent": silent,
        "accumulation": accumulation, "autocast": autocast, "allocator": allocator,
        "directions": directions, "mpc": mpc, "saving": saving,
    })  # fmt: skip
