"""Data parallel training, case by case: DDP, and FSDP2 with its units, precisions and checkpoints.

Each case is called as case(rank, world, folder) on every rank and returns numbers.
"""

import functools

import torch
from distributed_model import Calls, Reference, adapted, train, trained, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import decomp_kernels as dk
from decomp_kernels.linear import adapted_layers

METHODS = {
    "lora": dk.LoRA(r=4, alpha=8),
    "dora": dk.DoRA(r=4, alpha=8),
    "ssb": dk.SSB(),
    "vera": dk.VeRA(r=8),  # frozen projections that all layers share
}
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@functools.cache
def mesh(world: int):
    return init_device_mesh("cpu", (world,))


@functools.cache
def reference(name: str, dtype: torch.dtype = torch.float32, in_bf16: bool = False) -> Reference:
    return Reference(adapted(METHODS[name], dtype), in_bf16)


def shard(model, world: int, units: str = "blocks", **options):
    """fully_shard on each decoder layer and the root, and on smaller units inside them.

    A parameter that several units share must be left out, and stays whole on each rank.
    """
    options["mesh"] = mesh(world)
    options["ignored_params"] = {
        getattr(adapter, name)
        for layer in adapted_layers(model).values()
        for adapter in layer.adapters.values()
        for name in adapter.frozen
    }
    for block in model.model.layers:
        inside = list(adapted_layers(block).values())
        if units == "adapters":
            inside = [layer.adapters["default"] for layer in inside]
        for unit in inside if units != "blocks" else ():
            fully_shard(unit, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


def run(model, expected: Reference, rank: int, world: int) -> dict:
    """Train ``model`` on this rank's share and compare with one process on all."""
    with Calls() as calls:
        train(model, rank, world)
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    return expected.compare(values(model)) | {
        "calls": calls.count,
        "sharded": len(sharded),
        "all": len(parameters),
        "held": sum(p.to_local().numel() for p in sharded) / sum(p.numel() for p in parameters),
        "gradients": all(torch.isfinite(p.grad).all().item() for p in trained(model).values()),
    }


def alone(name, rank, world, folder):
    """The negative control: nothing is synchronised."""
    return run(adapted(METHODS[name]), reference(name), rank, world)


def alone_in_bf16(name, rank, world, folder):
    model = adapted(METHODS[name], torch.bfloat16)
    return run(model, reference(name, torch.bfloat16), rank, world)


def ddp(name, rank, world, folder):
    model = DistributedDataParallel(adapted(METHODS[name]))
    return run(model, reference(name), rank, world)


def fsdp(name, units, rank, world, folder):
    return run(shard(adapted(METHODS[name]), world, units), reference(name), rank, world)


def checkpointed(name, units, rank, world, folder):
    model = adapted(METHODS[name])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return run(shard(model.train(), world, units), reference(name), rank, world)


def mixed(name, units, rank, world, folder):
    model = shard(adapted(METHODS[name]), world, units, mp_policy=BF16)
    return run(model, reference(name, in_bf16=True), rank, world)


def bf16_base(name, rank, world, folder):
    """float32 adapters on a bf16 model, PEFT's default, in one unit."""
    model = shard(adapted(METHODS[name], torch.bfloat16), world)
    kinds = sorted({str(p.dtype) for p in model.parameters()})
    return run(model, reference(name, torch.bfloat16), rank, world) | {"dtypes": kinds}


CASES = {f"alone-{name}": functools.partial(alone, name) for name in METHODS}
CASES |= {f"ddp-{name}": functools.partial(ddp, name) for name in METHODS}
for _units in ("blocks", "layers", "adapters"):
    for _name in METHODS:
        CASES[f"fsdp-{_units}-{_name}"] = functools.partial(fsdp, _name, _units)
for _name in ("lora", "dora"):
    for _units in ("blocks", "adapters"):
        CASES[f"checkpointed-{_units}-{_name}"] = functools.partial(checkpointed, _name, _units)
        CASES[f"mixed-{_units}-{_name}"] = functools.partial(mixed, _name, _units)
    CASES[f"alone_in_bf16-{_name}"] = functools.partial(alone_in_bf16, _name)
    CASES[f"bf16_base-{_name}"] = functools.partial(bf16_base, _name)
