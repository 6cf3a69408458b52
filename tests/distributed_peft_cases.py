"""accelerate()d PEFT models on several processes, against PEFT itself in one process.

Each case is called as case(rank, world, folder) on every rank and returns numbers.
"""

import functools
import re

import torch
from distributed_cases import mesh
from distributed_model import TARGETS, Calls, Reference, llama, train, trained, values
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import decomp_kernels as dk


def peft_model(use_dora: bool):
    config = LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules=TARGETS)
    model = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in trained(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@functools.cache
def reference(use_dora: bool) -> Reference:
    return Reference(peft_model(use_dora))


def ddp(model, world):
    return DistributedDataParallel(model)


def blocks(model, world):
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh(world))
    return fully_shard(model, mesh=mesh(world))


def leaves(model, world):
    """What PEFT's fsdp_auto_wrap_policy picks: modules without children that are trained."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            fully_shard(module, mesh=mesh(world))
    return blocks(model, world)


def tensor_parallel(model, world):
    layers = "base_model.model.model.layers.*"
    plan = {}
    for name, style, part in (
        ("self_attn.q_proj", ColwiseParallel, "lora_B"),
        ("mlp.down_proj", RowwiseParallel, "lora_A"),
    ):
        plan[f"{layers}.{name}.base_layer"] = style()
        plan[f"{layers}.{name}.{part}.default"] = style()
    for name in ("k_proj", "v_proj"):
        plan[f"{layers}.self_attn.{name}"] = ColwiseParallel()
    plan[f"{layers}.self_attn.o_proj.base_layer"] = RowwiseParallel()
    plan[f"{layers}.self_attn.o_proj.lora_A.default"] = RowwiseParallel()
    for name in ("gate_proj", "up_proj"):
        plan[f"{layers}.mlp.{name}"] = ColwiseParallel()
    return parallelize_module(model, mesh(world), plan)


def accelerated(wrap, use_dora, rank, world, folder):
    model = dk.accelerate(peft_model(use_dora))
    wrapped = wrap(model, world)
    share = (0, 1) if wrap is tensor_parallel else (rank, world)
    with Calls() as calls:
        train(wrapped, *share)
    said = dk.report(model)
    return reference(use_dora).compare(values(wrapped)) | {
        "calls": calls.count,
        "sharded": sum(isinstance(p, DTensor) for p in wrapped.parameters()),
        "own": len(re.findall(r"PEFT", said)),
        "report": said.splitlines()[0],
    }


CASES = {
    f"peft-{wrap.__name__}-{'dora' if use_dora else 'lora'}": functools.partial(
        accelerated, wrap, use_dora
    )
    for wrap in (ddp, blocks, leaves, tensor_parallel)
    for use_dora in (False, True)
    if not (use_dora and wrap is tensor_parallel)  # PEFT's DoRA mixes DTensors with others itself
}
