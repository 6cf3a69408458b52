"""docs/peft.md's table against what accelerate does, and quantised bases against float64."""

import copy
import json
import logging
import warnings
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft_models import calls, configuration, moved, outcome, with_our_masks
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import decomp_kernels as dk
from decomp_kernels.ops.tiled_weight import dense
from decomp_kernels.quantized import quantized_weight
from decomp_kernels.testing import assert_as_good_as

K, N = 64, 96
DOCS = Path(__file__).parent.parent / "docs" / "peft.md"
RESULTS = "benchmarks/results/cpu/accelerated-layers.json"


def in_4bit(dtype):
    return bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=dtype)


def in_8bit(dtype):
    return bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)


def in_torchao(dtype):
    model = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


BASES = {
    "nn.Linear": lambda dtype: nn.Linear(K, N, dtype=dtype),
    "Conv1D": lambda dtype: Conv1D(N, K),
    "bnb 4-bit": in_4bit,
    "bnb 8-bit": in_8bit,
    "torchao int8": in_torchao,
    "Embedding": lambda dtype: nn.Embedding(K, N),
    "Conv2d": lambda dtype: nn.Conv2d(8, 8, 3),
    "MultiheadAttention": lambda dtype: nn.MultiheadAttention(K, 4),
}
INPUTS = {
    "Embedding": lambda: torch.arange(6).view(2, 3),
    "Conv2d": lambda: torch.randn(2, 8, 5, 5),
}
METHODS = {
    "LoRA": "lora",
    "DoRA": "dora",
    "IA3": "ia3",
    "AdaLoRA": "adalora",
    "OFT": "oft",
    "BOFT": "boft",
    "HRA": "hra",
    "VeRA": "vera",
    "LoHa": "loha",
    "LoKr": "lokr",
    "HiRA": "hira",
    "SHiRA": "shira",
}


class Whole(nn.Module):
    """One layer, under the name that the configurations target."""

    def __init__(self, base, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.second = BASES[base](dtype)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = base == "bnb 4-bit", base == "bnb 8-bit"
        self.to("cpu")  # which quantises the weights of bitsandbytes

    def forward(self, *inputs):
        return self.second(*inputs)


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_adapter(base, method, dtype=torch.float32):
    return moved(peft.get_peft_model(Whole(base, dtype), configuration(method, ["second"])))


def cell(method, base):
    """What the table says: whether the operator runs, or nothing where PEFT does not."""
    x = INPUTS.get(base, lambda: torch.randn(2, 3, K))()
    inputs = (x, x, x) if base == "MultiheadAttention" else (x,)
    try:
        with_adapter(base, method)(*inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return "–"
    # Another one: a forward of PEFT's DoRA leaves an 8-bit layer on a CPU unusable.
    model = dk.accelerate(with_adapter(base, method))
    model(*inputs)
    counted = calls(model)
    return "yes" if counted and counted[0] == {"fused": 1} else "no"


def table():
    section = DOCS.read_text().partition("## What is accelerated\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[one.strip() for one in row.strip("|").split("|")] for row in rows]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize("method", METHODS)
def test_the_documented_table_is_what_happens(method):
    header, rows = table()
    assert header == ["method", *BASES]
    assert list(rows) == list(METHODS)
    assert rows[method] == [cell(METHODS[method], base) for base in BASES]


def test_the_documented_times_are_the_results_files():
    found = json.loads((DOCS.parent.parent / RESULTS).read_text())["rows"]
    assert len(found) == 8
    assert all(row["path"].endswith(" fused") for row in found)
    for row in found:
        said, control = (
            f"{row[of][0]:.2f} [{row[of][1]:.2f}, {row[of][2]:.2f}]"
            for of in ("accelerated_over_peft", "control_over_peft")
        )
        line = f"| {row['method']}, {row['base']} | {row['dropout']:g} | {said} | {control} |"
        assert line in DOCS.read_text()


QUANTIZED = ("bnb 4-bit", "bnb 8-bit", "torchao int8")
ON_QUANTIZED = ("lora", "lora-dropout", "dora", "ia3", "adalora", "oft", "boft", "vera", "hira")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.parametrize("method", ON_QUANTIZED)
def test_quantised_bases_against_float64(method, base, dtype):
    """Exact: the same adapter on the dequantised weight."""
    if rows_say(method, base) != "yes":
        return
    stock = with_adapter(base, method, dtype)
    layer = stock.base_model.model.second
    exact = float64_of(stock, method)
    fast = dk.accelerate(copy.deepcopy(stock))
    with_our_masks(stock)
    x, dy = torch.randn(3, 40, K, dtype=dtype), torch.randn(3, 40, N, dtype=dtype)
    eager, got = outcome(stock, x, dy), outcome(fast, x, dy)
    truth = outcome(exact, x.double(), dy.double())
    (counted,) = calls(fast)
    more_exact = {"PEFT computes it in float32", GRADIENTS}
    assert set(counted) == {"fused"} or (dtype != torch.float32 and set(counted) <= more_exact)
    assert layer.base_layer.weight.dtype != torch.float64
    for name in truth:
        assert got[name].dtype == eager[name].dtype, name
        coarse = dtype if got[name].numel() < 16 or "magnitude" in name else None
        assert_as_good_as(got[name], eager[name], truth[name], name, coarse)


GRADIENTS = "gradients of torch.float32 through a product in torch.bfloat16"


def rows_say(method, base):
    names = {short: name for name, short in METHODS.items()}
    header, rows = table()
    return rows[names[method.partition("-")[0]]][header.index(base) - 1]


def float64_of(stock, method):
    """``stock`` with its base as the dense float64 weight that its codes stand for."""
    layer = stock.base_model.model.second
    plain = with_adapter("nn.Linear", method).double()
    ours = plain.base_model.model.second
    with torch.no_grad():
        ours.base_layer.weight.copy_(dense(quantized_weight(layer.base_layer), torch.float64))
        ours.base_layer.bias.copy_(layer.base_layer.bias)
        trained = {name: p for name, p in stock.named_parameters() if p.requires_grad}
        for name, p in plain.named_parameters():
            p.requires_grad_(name in trained)
            if name in trained:
                p.copy_(trained[name])
    return with_our_masks(plain)


def test_expert_parameters_are_not_accelerated():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return torch.einsum("ti,eio->to", x, self.up)

    model = nn.Sequential()
    model.experts = Experts()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
    model = dk.accelerate(peft.get_peft_model(model, config))
    assert "not accelerated, there is no form for peft.tuners.lora.layer.ParamWrapper" in dk.report(
        model
    )


def test_a_4bit_layer_that_computes_in_another_dtype_is_pefts():
    model = dk.accelerate(with_adapter("bnb 4-bit", "lora", torch.bfloat16)).train()
    model(torch.randn(2, K, dtype=torch.float16))
    assert calls(model) == [{"its base computes in torch.bfloat16, x is torch.float16": 1}]
