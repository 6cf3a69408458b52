"""Tensor parallel: a Llama by a plan, and single layers whose sizes the ranks do not divide.

Each case is called as case(rank, world, folder) on every rank and returns numbers.
"""

import functools

import torch
from distributed_cases import mesh
from distributed_model import Calls, Reference, adapted, llama, train, trained, values
from distributed_state_cases import largest, output
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import decomp_kernels as dk
from decomp_kernels.interop.tensor_parallel import ColwiseDecomposed, RowwiseDecomposed
from decomp_kernels.sharding import whole

METHODS = {
    "lora": dk.LoRA(r=4, alpha=8, lora_bias=True),
    "dora": dk.DoRA(r=4, alpha=8, cache_norm=True),
    "ssb": dk.SSB(),
    "ssl": dk.SSL(),
    "ia3": dk.IA3(scale_bias=True),
}


def plan(name: str) -> dict:
    """Columns then rows in each half of a block; DoRA, which has no form by rows, by columns."""
    down = RowwiseDecomposed()
    if name == "dora":
        down = ColwiseDecomposed(input_layouts=Shard(-1), output_layouts=Replicate())
    block = "model.layers.*"
    return {
        f"{block}.self_attn.[qkv]_proj": ColwiseDecomposed(),
        f"{block}.self_attn.o_proj": down,
        f"{block}.mlp.gate_proj": ColwiseDecomposed(),
        f"{block}.mlp.up_proj": ColwiseDecomposed(),
        f"{block}.mlp.down_proj": down,
    }


@functools.cache
def reference(name: str) -> Reference:
    return Reference(adapted(METHODS[name], target_modules="all-linear"))


def parallel(name, rank, world, folder):
    """Every rank has the same data.  Saved, the adapter is the one of a model in one process."""
    model = adapted(METHODS[name], target_modules="all-linear")
    parallelize_module(model, mesh(world), plan(name))
    return _trained(model, name, folder / f"tensor-{world}-{name}")


def with_fsdp(rank, world, folder):
    """A mesh of two dimensions: shards of shards."""
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    model = adapted(METHODS["lora"], target_modules="all-linear")
    parallelize_module(model, both["tensor"], plan("lora"))
    for block in model.model.layers:
        fully_shard(block, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    return _trained(model, "lora", folder / f"both-{world}")


def _trained(model, name, path):
    with Calls() as calls:
        train(model)
    tensors = trained(model).values()
    dk.save_adapter(model, path)
    distributed.barrier()
    loaded = dk.load_adapter(llama(), path)
    return reference(name).compare(values(model)) | {
        "calls": calls.count,
        "sharded": sum(isinstance(p, DTensor) for p in tensors),
        "split": sum(not all(q.is_replicate() for q in p.placements) for p in tensors),
        "reduced": all(p.grad.placements == p.placements for p in tensors),
        "loaded": largest(values(loaded), values(model)),
        "output": (output(loaded) - output(model)).abs().max().item(),
    }


def uneven(name, rank, world, folder):
    """Sizes that neither two nor three divide: outputs and gradients of one layer, in float64."""
    found = {"worst": 0.0, "smallest": float("inf")}
    for style in (ColwiseDecomposed, RowwiseDecomposed):
        if name == "dora" and style is RowwiseDecomposed:
            continue
        torch.manual_seed(5)
        one = dk.DecomposedLinear(nn.Linear(35, 25, dtype=torch.float64), METHODS[name])
        with torch.no_grad():
            for tensor in trained(one).values():
                tensor.add_(0.3 * torch.randn_like(tensor))
        x = torch.randn(2, 3, 35, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(2, 3, 25, dtype=torch.float64)
        want = one(x)
        grads = torch.autograd.grad((want * direction).sum(), [x, *trained(one).values()])
        options = {"input_layouts": Replicate(), "output_layouts": Replicate()}
        parallelize_module(one, mesh(world), style(**options))
        y = one(x)
        got = torch.autograd.grad((y * direction).sum(), [x, *trained(one).values()])
        for actual, exact in zip((y, *map(whole, got)), (want, *grads), strict=True):
            error = ((actual - exact).norm() / exact.norm()).item()
            found["worst"] = max(found["worst"], error)
            found["smallest"] = min(found["smallest"], exact.norm().item())
    return found


def refused(rank, world, folder):
    """Each is refused before the layer is touched."""
    said = []
    for method, style in (
        (METHODS["dora"], RowwiseDecomposed()),
        (dk.LoRA(r=4, activation="relu"), RowwiseDecomposed()),
        (dk.OFT(r=4), ColwiseDecomposed()),
        (None, ColwiseDecomposed()),
    ):
        plain = nn.Linear(48, 48)
        layer = dk.QuantizedLinear.from_linear(plain, "int8")
        if method is not None:
            layer = dk.DecomposedLinear(plain, method)
        try:
            parallelize_module(layer, mesh(world), style)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
        assert not any(isinstance(p, DTensor) for p in layer.parameters())
    return {"said": said}


CASES = {f"tensor-{name}": functools.partial(parallel, name) for name in METHODS}
CASES |= {f"uneven-{name}": functools.partial(uneven, name) for name in METHODS}
CASES |= {"tensor-with-fsdp": with_fsdp, "tensor-refused": refused}
