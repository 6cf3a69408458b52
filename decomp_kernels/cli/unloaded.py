"""A transformers model of a configuration alone: on the meta device, without values or memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decomp_kernels.cli.errors import BadInput, need, one_line
from decomp_kernels.cli.models import source_of, task_of

LLAMA: dict[str, dict[str, Any]] = {  # Llama 3.1's
    "llama-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "llama-70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
ATTENTION = "decomp_kernels_unloaded"
# What configurations, and models made of wrong ones, are seen to raise.
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


class Unloaded(NamedTuple):
    """blocks: the layers that transformers can checkpoint.  forward: a training step's, of rows."""

    model: nn.Module
    blocks: list[nn.Module]
    forward: Callable[[nn.Module], object]


def configuration(name: str) -> Any:
    """Of a built-in shape, a folder with a config.json, such a file, or a hub id."""
    transformers = need("transformers", "train")
    transformers.utils.logging.set_verbosity_error()
    if name in LLAMA:
        return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **LLAMA[name])
    path = Path(name).expanduser()
    if path.is_file():
        source, local = str(path), True
    elif path.is_dir() or "/" in name:
        source, local = source_of(name)
    else:
        raise BadInput(
            f"--model must be one of {', '.join(LLAMA)}, a config.json, a folder with one, or a "
            f"hub id such as owner/name; got {name!r}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=local)
    except Exception as error:  # its own checks of a configuration have classes of their own
        raise BadInput(f"cannot read the configuration {name}: {one_line(error)}") from None


def unloaded(config: Any, dtype: torch.dtype, rows: int, tokens: int) -> Unloaded:
    """The model as ``config`` says it was saved: a causal language model, else its bare body."""
    transformers = need("transformers", "train")
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput("models with an encoder and a decoder cannot be planned yet")
    if not getattr(config, "architectures", None):
        raise BadInput(
            'the configuration must name the class it is for, such as "architectures": '
            '["LlamaForCausalLM"]; add that line'
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise BadInput(f"--sequence-length must be at most the model's {positions}, got {tokens}")
    language = task_of(config) == "language"
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    transformers.AttentionInterface.register(ATTENTION, _attention)
    config.use_cache = False
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except UNUSABLE as error:
        why = one_line(error)
        if ATTENTION in why:
            why = "its attention is its own, none of transformers' AttentionInterface"
        raise BadInput(f"cannot make a model of the configuration: {why}") from None
    layer = transformers.modeling_layers.GradientCheckpointingLayer
    blocks = [module for module in model.modules() if isinstance(module, layer)]

    def forward(model: nn.Module) -> object:
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
        try:
            return model(input_ids=ids, **({"labels": ids} if language else {}))
        except UNUSABLE as error:
            raise BadInput(
                f"{type(model).__name__} cannot run on token ids without their values: "
                + one_line(error)
            ) from None

    return Unloaded(model, blocks, forward)


class _Attention(torch.autograd.Function):
    """What FlashAttention keeps for backward, and its output: laid out as q, as wide as v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out[..., : v.shape[-1]].transpose(1, 2)


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    """In transformers' AttentionInterface: q [batch, heads, tokens, width] -> (y, weights).

    A name that it knows no mask for is given none, and making one would need values.
    """
    return _Attention.apply(q, k, v), None
