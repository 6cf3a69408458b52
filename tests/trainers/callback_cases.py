"""Cases of with_trainer.py: each callback against a loop that does the same by hand."""

import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import DistributedType
from common import adapted, batch, data, distance, llama, perturb, trained
from harness import ADALORA, CONSTRAINT, has_core, loop, run
from safetensors.torch import load_file

import decomp_kernels as dk
from decomp_kernels.interop import trainers
from decomp_kernels.methods.adalora import RankAllocator


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
    cores = [m.core for m in model.modules() if has_core(m)]
    found["directions_trained"] = all(core.abs().min() > 0 for core in cores)
    found["said"] = []
    for bad, after in ((adapted(method), 6), (adapted(), 4), (adapted(method), 1.5)):
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


def events() -> dict[str, Any]:
    """What no run on a CPU meets: fp16's gradient scaler, a step that it skipped, sharding."""
    model, callback = perturb(adapted(ADALORA)), trainers.MPCLossCallback(**CONSTRAINT)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = SimpleNamespace(scaler=scaler, step_was_skipped=True)
    callback.on_step_begin(None, None, None, model=model, optimizer=optimizer)
    scaled = {n: p.grad / 8 for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dk.mpc_loss(model, **CONSTRAINT).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model(**batch(data(2))).loss.backward()

    state = SimpleNamespace(global_step=0, max_steps=8)
    allocate = trainers.RankAllocatorCallback()
    seen = []
    for skipped in (True, False):
        optimizer.step_was_skipped = skipped
        allocate.on_train_begin(None, state, None, model=model)
        allocate.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
        seen.append(len(allocate.allocator.mean))

    said = []
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        where = SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=kind))
        try:
            callback.on_train_begin(where, state, None, model=model)
        except ValueError as error:
            said.append(str(error))
    try:
        trainers.SaveAdapterCallback().on_train_begin(None, state, None, model=llama())
    except ValueError as error:
        said.append(str(error))
    return {"scaled": distance(scaled, plain), "matrices": len(plain), "seen": seen, "said": said}


CASES = {"allocator": allocator, "directions": directions, "mpc": mpc, "events": events}
