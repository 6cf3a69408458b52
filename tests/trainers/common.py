"""What the scripts of this folder share: a tiny Llama, its data, and how to look at a run.

Each script runs in a process of its own, because the libraries it meets keep global state, and
prints one JSON object, on which tests/test_trainers.py asserts.  By hand, with cases to choose:
PYTHONPATH=.:tests python tests/trainers/with_trainer.py mpc saving
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import decomp_kernels as dk

torch.set_num_threads(1)

VOCABULARY, LENGTH = 64, 12  # the first is tiny_llama's


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return tiny_llama(pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)


def data(rows: int = 64) -> list[dict[str, Any]]:
    """Counting upwards from a random start, so that there is something to learn."""
    start = torch.randint(3, VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(1))
    ids = 3 + (start + torch.arange(LENGTH)) % (VOCABULARY - 3)
    return [{"input_ids": row, "labels": row} for row in ids]


def batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, infinite where the names or a value differ in kind."""
    if one.keys() != other.keys() or not one:
        return float("inf")
    worst = max((one[name] - other[name]).abs().max().item() for name in one)
    return worst if worst == worst else float("inf")


def unmoved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Parameters with the same bits as before, or with values that are not finite."""
    return [
        name
        for name in before
        if torch.equal(before[name], after[name]) or not after[name].isfinite().all()
    ]


def perturb(model: nn.Module, std: float = 0.02, seed: int = 7) -> nn.Module:
    """Every trained tensor moved, so that the adapters change the output from the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += std * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model


def adapted(method: Any = None, seed: int = 0, **options: Any) -> nn.Module:
    """The tiny Llama with a method on every linear but the head."""
    model = llama(seed, **options)
    return dk.adapt(model, dk.LoRA(r=4, alpha=8, dropout=0.1) if method is None else method)


def main(cases: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Run the cases named on the command line, all without one, and print what they found."""
    wanted = sys.argv[1:] or list(cases)
    found = {name: cases[name]() for name in wanted}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
