"""Peak memory and time of a QLoRA step beside PEFT's: one quantised linear, forward and backward.

    python benchmarks/quantized_memory.py [FILE.json]        needs peft and bitsandbytes

bf16 x [512, 2048], a 2048 x 2048 layer, r = 16, float32 adapters as both libraries make them.  The
peak includes outputs and gradients, not weights and x.  DoRA's norm is the one of a step between
two optimizer steps; "norm each forward" is what the step after an optimizer step costs.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench import engine, memory, record
from decomp_kernels.ops import tiled_weight

SIZE, TOKENS, RANK, ROUNDS = 2048, 512, 16, 9
OUTPUT = Path(__file__).parent / "results/cpu/quantized-memory.json"
TILES = [1 << power for power in (17, 18, 19, 20, 21, 22)]
CPU = torch.device("cpu")


def nf4() -> nn.Module:
    module = bnb.nn.Linear4bit(
        SIZE, SIZE, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
    )
    module.weight.data = dense().weight.data
    return module.to("cpu")


def int8() -> nn.Module:
    module = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
    module.weight.data = dense().weight.data
    return module.to("cpu")


def dense() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE, bias=False).bfloat16()


BASES: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes nf4": nf4,
    "bitsandbytes int8": int8,
    "our nf4": lambda: dk.QuantizedLinear.from_linear(dense(), "nf4"),
    "our int8": lambda: dk.QuantizedLinear.from_linear(dense(), "int8"),
}


def ours(base: nn.Module, method: Any) -> nn.Module:
    return dk.adapt(nn.Sequential(base), method, ["0"])[0]


def theirs(base: nn.Module, **options: Any) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], **options)
    model: Any = nn.Sequential(base)
    model.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)  # as transformers says it to PEFT
    model.is_loaded_in_8bit = isinstance(base, bnb.nn.Linear8bitLt)
    return get_peft_model(model, config).base_model.model[0]


def layers(base: Callable[[], nn.Module], peft: bool) -> dict[str, nn.Module]:
    made = {
        engine.FROZEN: base().requires_grad_(False),
        "LoRA": ours(base(), dk.LoRA(r=RANK, alpha=RANK)),
        "DoRA": ours(base(), dk.DoRA(r=RANK, alpha=RANK)),
        "DoRA, norm each forward": ours(base(), dk.DoRA(r=RANK, alpha=RANK, cache_norm=False)),
        "SSB": ours(base(), dk.SSB()),
    }
    if peft:
        made["PEFT LoRA"] = theirs(base())
    if base is nf4:  # on int8, PEFT 0.21.2 loses bitsandbytes' scales as it makes DoRA's magnitude
        made["PEFT DoRA"] = theirs(base(), use_dora=True)
    return {name: layer.train() for name, layer in made.items()}


def measured(name: str, modules: dict[str, nn.Module]) -> list[dict[str, Any]]:
    x = torch.randn(TOKENS, SIZE).bfloat16()
    dy = torch.randn(TOKENS, SIZE).bfloat16()
    contenders = [engine.layer(label, module, x, dy) for label, module in modules.items()]
    samples = engine.measure(contenders, ROUNDS, split=False)
    rows = []
    for contender, module in zip(contenders, modules.values(), strict=True):
        kept = [x, *module.parameters(), *module.buffers()]
        rows.append(
            {
                "base": name,
                "layer": contender.name,
                "peak_bytes": memory.peak_bytes(contender, CPU),
                "saved_bytes": memory.saved_bytes(contender, kept),
                "over_frozen": list(samples.ratio(contender.name)),
                "ms": [round(ns / 1e6, 3) for ns in samples.ns[contender.name]["both"]],
            }
        )
    return rows


def tiles() -> list[dict[str, Any]]:
    """The frozen layer with tiles of other sizes; in turns, as everything here."""
    frozen = BASES["our nf4"]().requires_grad_(False)
    x, dy = (torch.randn(TOKENS, SIZE).bfloat16() for _ in range(2))
    shipped = tiled_weight.TILE_ELEMENTS

    def of(size: int) -> engine.Contender:
        whole = engine.layer(f"tile {size}", frozen, x, dy)

        def reset() -> None:
            tiled_weight.TILE_ELEMENTS = size
            whole.reset()

        return engine.Contender(whole.name, whole.forward, whole.backward, reset)

    contenders = [of(size) for size in TILES]
    try:
        samples = engine.measure(contenders, ROUNDS, split=False)
        return [
            {
                "tile_elements": size,
                "peak_bytes": memory.peak_bytes(contender, CPU),
                "over_shipped": list(samples.ratio(contender.name, against=f"tile {shipped}")),
            }
            for size, contender in zip(TILES, contenders, strict=True)
        ]
    finally:
        tiled_weight.TILE_ELEMENTS = shipped


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, base in BASES.items():
        rows += measured(name, layers(base, peft=name.startswith("bitsandbytes")))
    rows += tiles()
    protocol = {
        "shape": [TOKENS, SIZE, SIZE], "r": RANK, "dtype": "bfloat16", "adapters": "float32",
        "rounds": ROUNDS, "order": "random in each round", "warmup": 3,
        "peak": "largest sum of allocations in one forward + backward, weights and x left out",
    }  # fmt: skip
    content = record.document("quantized-memory", protocol, rows)
    content["versions"] |= {"bitsandbytes": bnb.__version__}
    record.write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT, content)
    for row in rows:
        what = row.get("layer", f"tile {row.get('tile_elements')}")
        ratio = row.get("over_frozen") or row["over_shipped"]
        mib = row["peak_bytes"] / 2**20
        print(f"{row.get('base', ''):18} {what:24} {mib:6.1f} MiB  {ratio[0]:.2f}", ratio[1:])


if __name__ == "__main__":
    main()
