"""transformers.Trainer on models from adapt(): learning, resuming, saving, and the callbacks."""

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from callback_cases import CASES
from common import adapted, batch, data, distance, frozen, llama, main, perturb, trained, unmoved
from harness import ADALORA, CONSTRAINT, has_core, loop, run
from safetensors.torch import load_file
from torch import Tensor, nn

import decomp_kernels as dk
from decomp_kernels.interop import trainers

SAVED_ONCE = re.compile(r"^lm_head\.weight$|\.shared_(down|up)$")  # of tensors with two names


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
                ranks = [m.core.count_nonzero().item() for m in again.modules() if has_core(m)]
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
    main({
        "learning": learning, "resumed": resumed, "checkpointing": checkpointing, "silent": silent,
        "accumulation": accumulation, "autocast": autocast, "saving": saving, **CASES,
    })  # fmt: skip
