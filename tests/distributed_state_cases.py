"""What is kept of a model in shards: files, state dicts, checkpoints, norms; and what is refused.

Each case is called as case(rank, world, folder) on every rank and returns numbers.
"""

import copy
import warnings

import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import BF16, METHODS, shard
from distributed_model import TARGETS, adapted, data, llama, train, trained, values
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import decomp_kernels as dk
from decomp_kernels.linear import adapted_layers
from decomp_kernels.sharding import reshard


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=data()[0]).logits.float()


def largest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in other)


def files(rank, world, folder):
    """A bf16 forward has left blocks gathered; saved are the float32 parameters all the same.

    The last block has no adapter, but biases that train.
    """
    plain = adapted(METHODS["dora"], target_modules=r".*layers\.[012].*_proj", bias="all")
    want, base = output(plain), output(llama())
    model = copy.deepcopy(plain)
    shard(model, world, mp_policy=BF16, reshard_after_forward=False)
    output(model)
    gathered = {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    dk.save_adapter(model, folder / f"sharded-{world}-{rank}")
    distributed.barrier()
    loaded = dk.load_adapter(llama(), folder / f"sharded-{world}-0")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {
        "gathered": gathered,
        "written": (folder / f"sharded-{world}-{rank}").exists(),
        "adds": (want - base).abs().max().item(),
        "loaded": (output(loaded) - want).abs().max().item(),
        "state": largest(state, plain.state_dict()) if rank == 0 else len(state),
    }


def quantised(rank, world, folder):
    """A quantised base in shards computes what it does whole, and its file says what it is."""
    found = {}
    for kind in ("nf4", "int8"):
        plain = dk.adapt(dk.quantize(llama(), kind), METHODS["dora"], TARGETS)
        with torch.no_grad():
            for tensor in trained(plain).values():
                tensor.add_(0.1)
        model = shard(copy.deepcopy(plain), world)
        want = output(plain)
        found[f"{kind} wrong"] = (output(model) - want).abs().max().item()
        found[f"{kind} codes"] = str(model.model.layers[0].mlp.down_proj.weight.dtype)
        dk.save_adapter(model, folder / f"{kind}-{world}")
        distributed.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of another base than the adapter was trained on
            loaded = dk.load_adapter(dk.quantize(llama(), kind), folder / f"{kind}-{world}")
        found[f"{kind} loaded"] = (output(loaded) - want).abs().max().item()
    return found


def files_of_ddp(rank, world, folder):
    model = DistributedDataParallel(adapted(METHODS["lora"]))
    train(model, rank, world, steps=1)
    if rank == 0:
        dk.save_adapter(model, folder / f"ddp-{world}")
    distributed.barrier()
    loaded = dk.load_adapter(llama(), folder / f"ddp-{world}")
    return {"loaded": largest(values(loaded), values(model))}


def refused(rank, world, folder):
    """What changes the layers of a model in shards says what to do, and the model is as before."""
    plain = adapted(METHODS["lora"])
    dk.save_adapter(plain, folder / f"refused-{world}-{rank}")
    want = output(plain)
    model = shard(plain, world)
    layer = next(iter(adapted_layers(model).values()))
    said = []
    for attempt in (
        lambda: dk.adapt(model, dk.LoRA(r=2), adapter_name="second"),
        lambda: dk.load_adapter(model, folder / f"refused-{world}-{rank}", adapter_name="second"),
        lambda: dk.merge(model),
        lambda: dk.remove(model),
        lambda: dk.quantize(model, "nf4", ["gate_proj"]),
        lambda: layer(torch.randn(2, 48)),
    ):
        try:
            attempt()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return {"said": said, "changed": (output(model) - want).abs().max().item()}


def reloaded(rank, world, folder):
    """DoRA's norm is that of the weights in use, after other ones have come into the shards."""
    found = {}
    for cached in (False, True):
        plain = adapted(dk.DoRA(r=4, cache_norm=cached))
        other = copy.deepcopy(plain)
        for layer in adapted_layers(other).values():
            state = layer.state_dict()
            rows = torch.linspace(0.5, 2, len(state["weight"]))[:, None]
            layer.load_state_dict(state | {"weight": state["weight"] * rows})
        model = shard(plain, world)
        before = output(model)
        state = other.state_dict()
        options = StateDictOptions(full_state_dict=True)
        reshard(model)  # the root stays gathered after a forward, and torch loads shards
        set_model_state_dict(model, state, options=options)
        # The new values may lie where the old ones lay, so that no pointer tells.
        kept = [layer.adapters["default"] for layer in adapted_layers(model).values()]
        found[f"forgotten-{cached}"] = all(a.weight_seen is a.kept_norm is None for a in kept)
        found[f"changed-{cached}"] = (output(other) - before).abs().max().item()
        found[f"wrong-{cached}"] = (output(model) - output(other)).abs().max().item()
    return found


def checkpoint(rank, world, folder):
    """Two ranks save; three go on from there, and so does one, as one process would have."""
    model = shard(adapted(METHODS["dora"]), world)
    made = torch.optim.AdamW(trained(model).values(), lr=0.05)
    path = folder / "checkpoint"
    found = {}
    if world == 2:
        train(model, rank, world, steps=2, optimizer=made)
        state, optimizer_state = get_state_dict(model, made)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=path)
    else:
        _load(model, made, path)
        single = adapted(METHODS["dora"])
        one = torch.optim.AdamW(trained(single).values(), lr=0.05)
        _load(single, one, path, no_dist=True)
        train(single, steps=2, optimizer=one)
        found["single"] = largest(values(single), _uninterrupted(4))
    train(model, rank, world, steps=2, optimizer=made)
    return found | {
        "wrong": largest(values(model), _uninterrupted(4)),
        "moved": largest(_uninterrupted(2), _uninterrupted(4)),
    }


def _load(model, optimizer, path, **options):
    state, optimizer_state = get_state_dict(model, optimizer)
    saved = {"model": state, "optimizer": optimizer_state}
    dcp.load(saved, checkpoint_id=path, **options)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )


def _uninterrupted(steps: int) -> dict[str, torch.Tensor]:
    model = adapted(METHODS["dora"])
    train(model, steps=steps, optimizer=torch.optim.AdamW(trained(model).values(), lr=0.05))
    return values(model)


def dropout(rank, world, folder):
    """Masks come from each rank's generator; a checkpointed forward draws them again."""
    trained_with = []
    for checkpointed in (False, True):
        model = adapted(dk.LoRA(r=4, dropout=0.5))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model.train(), world, "adapters")
        torch.manual_seed(rank)
        train(model, rank, world)
        trained_with.append(values(model))
    without = adapted(dk.LoRA(r=4))
    train(shard(without, world), rank, world)
    outputs = []
    for seed in (rank, 0):
        torch.manual_seed(seed)
        mine = output(model)
        gathered = [torch.empty_like(mine) for _ in range(world)]
        distributed.all_gather(gathered, mine)
        outputs.append(max((other - gathered[0]).abs().max().item() for other in gathered))
    return {
        "checkpointed": largest(*trained_with),
        "effect": largest(trained_with[0], values(without)),
        "own_seeds": outputs[0],
        "one_seed": outputs[1],
    }


CASES = {
    "files": files,
    "quantised": quantised,
    "files_of_ddp": files_of_ddp,
    "refused": refused,
    "reloaded": reloaded,
    "checkpoint": checkpoint,
    "dropout": dropout,
}
