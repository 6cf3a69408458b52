"""A tiny Llama with an adapter, the data of all ranks, and training steps on any share of them."""

import copy
import importlib

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import decomp_kernels as dk
from decomp_kernels.sharding import whole
from decomp_kernels.testing import assert_as_good_as

SEQUENCES, LENGTH, VOCABULARY, STEPS, RATE = 6, 8, 64, 3, 0.5  # 6: two and three ranks divide it
TARGETS = ["q_proj", "o_proj", "down_proj"]
ADAPTED = 4 * len(TARGETS)
operator = importlib.import_module("decomp_kernels.ops.decomposed_linear")


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same numbers each time, in every dtype; biases that are not zero."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=32, use_cache=False,
        initializer_range=0.2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def adapted(method, dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    """Adapters are moved off their start, so that they change the output and get every gradient."""
    model = dk.adapt(llama(dtype), method, **{"target_modules": TARGETS, **options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in trained(model).values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.add_(0.1 * noise.to(tensor.dtype))
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) of all ranks."""
    generator = torch.Generator().manual_seed(3)
    shape = (SEQUENCES, LENGTH)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    return tokens, torch.randint(VOCABULARY, shape, generator=generator)


def loss_of(model: nn.Module, rank: int = 0, world: int = 1) -> torch.Tensor:
    """The mean over this rank's sequences: its mean over ranks is that over all data."""
    tokens, labels = data()
    share = SEQUENCES // world
    mine = slice(rank * share, (rank + 1) * share)
    logits = model(input_ids=tokens[mine]).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[mine].flatten())


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters by their names in the model itself, without a wrapper's."""
    return {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in trained(model).items()}


def train(model: nn.Module, rank: int = 0, world: int = 1, steps: int = STEPS, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(trained(model).values(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, rank, world).backward()
        optimizer.step()


class InBf16(nn.Module):
    """What MixedPrecisionPolicy(param_dtype=bfloat16) computes, in one process."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs):
        cast = {name: p.to(torch.bfloat16) for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, cast, (), inputs)


class Reference:
    """A model, trained on all data in one process: in its own dtypes, and in float64.

    in_bf16: its own dtype is that of a bfloat16 copy, from float32 parameters.
    """

    def __init__(self, model: nn.Module, in_bf16: bool = False) -> None:
        single, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        train(InBf16(single) if in_bf16 else single)
        train(exact)
        self.start, self.single, self.exact = values(model), values(single), values(exact)
        self.dtype = torch.bfloat16 if in_bf16 else model.dtype  # of intermediate results

    def compare(self, found: dict[str, torch.Tensor]) -> dict:
        """wrong: parameters further from float64 than the policy allows, with the first message."""
        assert found.keys() == self.exact.keys()
        wrong = []
        for name, tensor in found.items():
            try:
                assert_as_good_as(tensor, self.single[name], self.exact[name], name, self.dtype)
            except AssertionError as error:
                wrong.append(str(error))

        def largest(one, other):
            return [(one[name] - other[name]).abs().max().item() for name in other]

        return {
            "parameters": len(found),
            "wrong": len(wrong),
            "first": wrong[0] if wrong else "",
            "difference": max(largest(found, self.single)),
            "moved": min(largest(found, self.start)),
        }


class Calls:
    """Counts runs of the fused operator's forward while the ``with`` block lasts."""

    def __enter__(self):
        self.count, self._kept = 0, operator._forward
        self._node = operator.autograd_node

        def counted(*arguments):
            self.count += 1
            return self._kept(*arguments)

        def chosen(*arguments):
            found = self._node(*arguments)
            return found and (counted_node(found[0]), found[1])

        def counted_node(node):
            def run(*arguments):
                self.count += 1
                return node(*arguments)

            return run

        operator._forward, operator.autograd_node = counted, chosen
        return self

    def __exit__(self, *_):
        operator._forward, operator.autograd_node = self._kept, self._node
