"""Time of one PEFT layer after ``accelerate`` over the same layer before, forward and backward.

    python benchmarks/accelerated_layers.py [FILE.json]        needs peft

A 1024 x 1024 layer, 512 tokens, r = 16, one thread.  A second copy of PEFT's layer is the control:
what its ratio is away from 1 is noise.
"""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench import engine, record

SIZE, TOKENS, RANK, ROUNDS = 1024, 512, 16, 31
OUTPUT = Path(__file__).parent / "results/cpu/accelerated-layers.json"
PEFT, CONTROL, ACCELERATED = "PEFT", "control", "accelerated"
CASES = [
    (dtype, use_dora, dropout)
    for dtype in (torch.bfloat16, torch.float32)
    for use_dora in (False, True)
    for dropout in (0.0, 0.05)
]


def measured(dtype: torch.dtype, use_dora: bool, dropout: float) -> dict[str, Any]:
    """One row; adapters are float32, PEFT's default."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=dropout, use_dora=use_dora, target_modules=["0"]
    )
    model = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE, dtype=dtype)), config).train()
    models = {PEFT: model, CONTROL: copy.deepcopy(model)}
    models[ACCELERATED] = dk.accelerate(copy.deepcopy(model))
    x, dy = (torch.randn(TOKENS, SIZE, dtype=dtype) for _ in range(2))
    contenders = [engine.layer(name, one, x, dy) for name, one in models.items()]
    samples = engine.measure(contenders, ROUNDS, split=False)
    return {
        "method": "DoRA" if use_dora else "LoRA",
        "base": str(dtype).removeprefix("torch."),
        "dropout": dropout,
        "control_over_peft": list(samples.ratio(CONTROL, against=PEFT)),
        "accelerated_over_peft": list(samples.ratio(ACCELERATED, against=PEFT)),
        "peft_ms": round(samples.time(PEFT).median / 1e6, 3),
        "path": dk.report(models[ACCELERATED]),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [measured(*case) for case in CASES]
    protocol = {
        "shape": [TOKENS, SIZE, SIZE], "r": RANK, "adapters": "float32", "rounds": ROUNDS,
        "order": "random in each round", "warmup": 3, "ratio": "median, first and third quartile",
    }  # fmt: skip
    content = record.document("accelerated-layers", protocol, rows)
    record.write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT, content)
    for row in rows:
        print({name: value for name, value in row.items() if name != "path"}, row["path"])


if __name__ == "__main__":
    main()
