"""docs/quantized.md's figures: those of the results file, and peaks measured again here."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.bench import engine, memory

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "benchmarks/results/cpu/quantized-memory.json").read_text())
ROWS = {(row["base"], row["layer"]): row for row in RESULTS["rows"] if "layer" in row}
MIB = 2**20


def table(head):
    """The rows of the document's table whose first line begins with ``head``."""
    text = (ROOT / "docs/quantized.md").read_text()
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_peaks_of_the_document_are_the_measured_ones():
    head, _, *rows = table("| peak MiB |")
    assert len(rows) >= 5
    for layer, *cells in rows:
        for base, cell in zip(head[1:], cells, strict=True):
            measured = ROWS.get((base, layer))
            assert cell == ("" if measured is None else f"{measured['peak_bytes'] / MIB:.1f}")


def test_times_of_the_document_are_the_measured_ones():
    head, _, *rows = table("| time over frozen |")
    assert len(rows) >= 5
    for layer, *cells in rows:
        for base, cell in zip(head[1:], cells, strict=True):
            measured = ROWS.get((base, layer))
            if measured is None:
                assert cell == ""
                continue
            found = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            assert found == pytest.approx(measured["over_frozen"], abs=0.0051)


@pytest.mark.parametrize("layer", ["LoRA", "DoRA"])
def test_peaks_are_what_they_were(layer):
    tokens, _, size = RESULTS["protocol"]["shape"]
    model = nn.Sequential(nn.Linear(size, size, bias=False).bfloat16())
    dk.quantize(model, "nf4", ["0"])
    method = dk.methods()[layer.lower()](r=RESULTS["protocol"]["r"])
    x, dy = (torch.randn(tokens, size).bfloat16() for _ in range(2))
    step = engine.layer("step", dk.adapt(model, method, ["0"])[0].train(), x, dy)
    peak = memory.peak_bytes(step, x.device)
    assert peak == pytest.approx(ROWS["our nf4", layer]["peak_bytes"], rel=0.1)
    theirs = ROWS["bitsandbytes nf4", f"PEFT {layer}"]["peak_bytes"]
    assert peak < theirs / (1.45 if layer == "LoRA" else 6)
