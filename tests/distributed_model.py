"""A tiny Llama with an adapter, the data of all ranks, and training steps on any share of them."""

import importlib

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import decomp_kernels as dk

SEQUENCES, LENGTH, VOCABULARY, STEPS, RATE = 6, 8, 64, 3, 0.5  # 6: two and three ranks divide it
METHODS = {"lora": dk.LoRA(r=4, alpha=8), "dora": dk.DoRA(r=4, alpha=8), "ssb": dk.SSB()}
operator = importlib.import_module("decomp_kernels.ops.decomposed_linear")


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same numbers each time, in every dtype."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=32, use_cache=False,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(config).to(dtype)


def adapted(method, dtype=torch.float32, **options) -> LlamaForCausalLM:
    """Adapters are moved off their start, so that they change the output and get every gradient."""
    model = dk.adapt(llama(torch.float32), method, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in trained(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float32))
    return model.to(dtype) if dtype != torch.float32 else model


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
    """Trained parameters by their name in the unwrapped model."""
    return {
        name.replace("module.", "").replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train(model: nn.Module, rank: int = 0, world: int = 1, steps: int = STEPS, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(trained(model).values(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, rank, world).backward()
        optimizer.step()


class Calls:
    """Counts runs of the fused operator's forward while the ``with`` block lasts."""

    def __enter__(self):
        self.count, self._kept = 0, operator._forward

        def counted(*arguments):
            self.count += 1
            return self._kept(*arguments)

        operator._forward = counted
        return self

    def __exit__(self, *_):
        operator._forward = self._kept
