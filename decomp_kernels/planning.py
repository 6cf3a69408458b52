"""``plan``: the bytes that fine-tuning a model with a method holds, counted without its values.

The model is on the meta device, where tensors have shapes and no memory.  Its parameters are
counted one by one.  What it keeps for backward is counted by running its own forward there and
adding up the storages that autograd saves, each once: no formula knows an architecture.

    one GPU, or any number under DDP    W + G + O + S
    n GPUs under FSDP2                  W_n + G_n + O_n + (unit of the root) + (largest block) + S

W weights, adapters and buffers, G gradients, O optimizer state, S saved.  _n: a rank's share, each
parameter cut along its first dimension and its shares rounded up to whole rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decomp_kernels.linear import Decomposed, adapted_layers, decomposed_class
from decomp_kernels.methods.base import Method
from decomp_kernels.model import adapt
from decomp_kernels.targets import Names, output_head

# How many tensors of a parameter's own shape and dtype torch.optim's optimizer keeps beside it.
OPTIMIZERS = {"adamw": 2, "sgd": 0}
NF4_BLOCK = 64  # elements that share one float32 scale; int8 has one scale a row


class Saved(NamedTuple):
    """Bytes kept between forward and backward.

    kept: by a plain forward.  until_backward, one_block: where every block is checkpointed, what is
    kept until the backward, and what the largest block keeps more once it is computed again.
    """

    kept: int
    until_backward: int
    one_block: int

    def held(self, checkpointed: bool) -> int:
        return self.until_backward + self.one_block if checkpointed else self.kept


@dataclass(frozen=True)
class Plan:
    """What ``plan`` returns: the model's class, numbers of parameters, and bytes.

    base: the model's own weights and buffers.  adapters: what the method adds, trained or not.
    shards: {GPUs: a rank's bytes under FSDP2, without what is saved for backward}.
    """

    model: str
    parameters: int
    trainable: int
    base: int
    adapters: int
    gradients: int
    optimizer: int
    saved: Saved
    shards: dict[int, int]

    def whole(self, checkpointed: bool = False) -> int:
        """Bytes of one GPU that is alone, or one of any number under DDP."""
        model = self.base + self.adapters + self.gradients + self.optimizer
        return model + self.saved.held(checkpointed)

    def sharded(self, gpus: int, checkpointed: bool = False) -> int:
        """Bytes of one of ``gpus`` under FSDP2."""
        return self.shards[gpus] + self.saved.held(checkpointed)


def plan(
    model: nn.Module,
    method: Method,
    forward: Callable[[nn.Module], object],
    blocks: Sequence[nn.Module] = (),
    *,
    target_modules: Names = "all-linear",
    float32_adapter: bool = True,
    quantized: str | None = None,
    optimizer: str = "adamw",
    gpus: Iterable[int] = (),
) -> Plan:
    """Adapt ``model``, which is on the meta device, and count; it stays adapted.

    forward(model): one training forward, on tensors of the meta device.  blocks: the modules that
    are checkpointed and that are FSDP2's units, such as a transformer's layers.  quantized: "nf4"
    or "int8", the format of every linear but the language-model head.  optimizer: a key of
    OPTIMIZERS.  gpus: the numbers to fill ``Plan.shards`` for.

    Raises ValueError where an option is not one of these or the model has values, and what
    ``adapt`` and the forward raise.
    """
    for what, value, allowed in (
        ("quantized", quantized, (None, "nf4", "int8")),
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
    ):
        if value not in allowed:
            raise ValueError(f"{what} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    if not all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "plan counts shapes: the model must be on the meta device; make it inside "
            'torch.device("meta"), or give a copy that was moved there'
        )
    # The one implementation that runs without values; what is saved is the same for all.
    adapt(model, replace(method, impl="aten"), target_modules,
          autocast_adapter_dtype=float32_adapter)  # fmt: skip
    for layer in adapted_layers(model).values():
        for adapter in layer.adapters.values():
            adapter.initialized = True  # as far as a forward without values goes, it is
    saved = saved_for_backward(model.train(), forward, blocks)

    stored = _stored(model, quantized)
    buffers = {name: tensor.nbytes for name, tensor in model.named_buffers()}
    states = OPTIMIZERS[optimizer]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    named = {name: stored[p] for name, p in model.named_parameters()} | buffers
    adapters = sum(size for name, size in named.items() if ".adapters." in name)
    return Plan(
        model=type(model).__name__,
        parameters=sum(p.numel() for n, p in model.named_parameters() if ".adapters." not in n),
        trainable=sum(p.numel() for p in trained),
        base=sum(named.values()) - adapters,
        adapters=adapters,
        gradients=gradients,
        optimizer=states * gradients,
        saved=saved,
        shards={
            number: _share(stored, number, states)
            + sum(buffers.values())
            + _gathered(model, blocks, stored)
            for number in gpus
        },
    )


def saved_for_backward(
    model: nn.Module, forward: Callable[[nn.Module], object], blocks: Sequence[nn.Module]
) -> Saved:
    """What autograd keeps of ``forward(model)``, parameters and buffers left out.

    Storages, not tensors: views of one storage are one, and are held here so that none is reused.
    """
    own = set(_storages((*model.parameters(), *model.buffers())))
    within: dict[nn.Module | None, set[Any]] = {block: set() for block in (None, *blocks)}
    inputs: set[Any] = set()  # of blocks: what checkpointing computes them again from
    running: list[nn.Module | None] = [None]

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        running.append(block)
        inputs.update(_storages(tree_leaves((args, kwargs))))

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def pack(tensor: Tensor) -> Tensor:
        within[running[-1]].add(tensor.untyped_storage())
        return tensor

    with ExitStack() as hooks:
        for block in blocks:
            for handle in (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave, always_call=True),
            ):
                hooks.callback(handle.remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        forward(model)
    outside = (within[None] | inputs) - own
    return Saved(
        kept=_bytes(set().union(*within.values()) - own),
        until_backward=_bytes(outside),
        one_block=max((_bytes(within[block] - outside - own) for block in blocks), default=0),
    )


def _storages(found: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in found if isinstance(tensor, Tensor))


def _bytes(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def _stored(model: nn.Module, quantized: str | None) -> dict[nn.Parameter, int]:
    """The bytes of each parameter's values, in the format that they are kept in."""
    stored = {parameter: parameter.nbytes for parameter in model.parameters()}
    head = output_head(model)
    for module in model.modules() if quantized else ():
        cls: Any = type(module) if isinstance(module, Decomposed) else decomposed_class(module)
        if cls is not None and module is not head:
            weight: Any = module.weight
            elements, rows = weight.numel(), cls.base_weight(module).shape[0]
            if quantized == "nf4":
                stored[weight] = -(-elements // 2) + 4 * -(-elements // NF4_BLOCK)
            else:
                stored[weight] = elements + 4 * rows
    return stored


def _share(stored: dict[nn.Parameter, int], gpus: int, states: int) -> int:
    """The largest rank's part of the parameters, their gradients and their optimizer state."""
    total = 0
    for parameter, size in stored.items():
        rows = parameter.shape[0] if parameter.dim() else 1
        copies = parameter.nbytes * (1 + states) if parameter.requires_grad else 0
        total += -(-rows // gpus) * (size + copies) // max(rows, 1)
    return total


def _gathered(
    model: nn.Module, blocks: Sequence[nn.Module], stored: dict[nn.Parameter, int]
) -> int:
    """What FSDP2 holds whole during a step: the root's own parameters, and one block's."""
    units = [set(block.parameters()) for block in blocks]
    root = set(model.parameters()).difference(*units)
    sizes = [sum(stored[parameter] for parameter in unit) for unit in (root, *units)]
    return sizes[0] + max(sizes[1:], default=0)
