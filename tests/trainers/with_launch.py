"""Two processes under ``accelerate launch``: DistributedDataParallel against one process.

Rank 0 compares with loops that see all rows.  The test gives the launcher's arguments.
"""

import contextlib
import sys
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from common import adapted, batch, data, distance, main, perturb, trained
from harness import CONSTRAINT, loop, run

import decomp_kernels as dk
from decomp_kernels.interop import trainers
from decomp_kernels.methods.adalora import RankAllocator


def own_loop() -> dict[str, Any]:
    """accelerate's own loop, 4 steps of SGD, the gradient averaged over the ranks or not."""
    accelerator = Accelerator(cpu=True)
    rank, rows = accelerator.process_index, data()
    ends = {}
    for name in ("synced", "not"):
        model, optimizer = accelerator.prepare(*_with_sgd())
        assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
        for step in range(4):
            mine = rows[8 * step + 4 * rank :][:4]
            with contextlib.nullcontext() if name == "synced" else model.no_sync():
                accelerator.backward(model(**batch(mine)).loss)
            optimizer.step()
            optimizer.zero_grad()
        ends[name] = trained(accelerator.unwrap_model(model))
    single, optimizer = _with_sgd()
    start = trained(single)
    for step in range(4):
        single(**batch(rows[8 * step :][:8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "processes": accelerator.num_processes,
        "synced": distance(ends["synced"], trained(single)),
        "not_synced": distance(ends["not"], trained(single)),
        "moved": distance(start, trained(single)),
    }


def _with_sgd() -> tuple[Any, torch.optim.Optimizer]:
    model = perturb(adapted(dk.DoRA(r=4, alpha=8)))
    return model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)


def callbacks() -> dict[str, Any]:
    """The Trainer with the rank allocator and the constraint, with and without the constraint."""
    method = dk.AdaLoRA(r=4, target_r=2, alpha=8, tinit=1, tfinal=1)
    ends, ranks = {}, {}
    for name in ("with", "without"):
        model = perturb(adapted(method))
        allocator = trainers.RankAllocatorCallback()
        constraint = [trainers.MPCLossCallback(**CONSTRAINT)] if name == "with" else []
        trainer, _ = run(
            model, [allocator, *constraint], max_steps=5, gradient_accumulation_steps=2
        )
        ends[name], ranks[name] = trained(model), allocator.allocator.ranks()
    single, own = perturb(adapted(method)), RankAllocator(method, 5)
    loop(single, 5, rows=8, accumulate=2, constraint=CONSTRAINT, allocator=own)
    everywhere: list[Any] = [None] * trainer.args.world_size
    torch.distributed.all_gather_object(everywhere, (ends["with"], ranks["with"]))
    return {
        "processes": trainer.args.world_size,
        "with": distance(ends["with"], trained(single)),
        "without": distance(ends["without"], trained(single)),
        "same_ranks": ranks["with"] == own.ranks(),
        "kept": sum(own.ranks().values()),
        "between_processes": distance(everywhere[0][0], everywhere[1][0]),
        "ranks_between_processes": everywhere[0][1] == everywhere[1][1],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"own_loop": own_loop, "callbacks": callbacks})
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
