"""Models small enough to compile: a Llama of two layers, and two linears."""

import torch
from torch import nn

import decomp_kernels as dk


def tiny_llama(layers=2, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_cache=False,
            **options,
        )  # fmt: skip
    )


def two_linears(features=24):
    return nn.Sequential(nn.Linear(features, 40), nn.Tanh(), nn.Linear(40, 16))


def adapted(model, method, size=0.1, **options):
    """``method`` on the model, its trained tensors moved so that they change the output."""
    dk.adapt(model, method, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
