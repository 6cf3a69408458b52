"""A weight in codes: quantised, made dense, and read tile by tile in a layer's call."""

import cases
import pytest
import torch

from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.dequantize import dequantize
from decomp_kernels.ops.merged_weight import merged_weight
from decomp_kernels.ops.quantize import quantize_weight

FORMATS = ("nf4", "int8")


@pytest.mark.parametrize("weight_format", FORMATS)
def bench_quantize(benchmark, weight_format, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    cases.forward(
        benchmark, f"quantize {shape} {dtype}", lambda: quantize_weight(weight, weight_format)
    )


@pytest.mark.parametrize("weight_format", FORMATS)
def bench_dequantize(benchmark, weight_format, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    made = quantize_weight(weight, weight_format)
    cases.forward(
        benchmark, f"dequantize {shape} {dtype}",
        lambda: dequantize(
            made.codes, made.scale, weight_format, shape=tuple(weight.shape), dtype=dtype
        ),
    )  # fmt: skip


@pytest.mark.parametrize("weight_format", ["dense", *FORMATS])
def bench_quantized_linear(benchmark, weight_format, shape, dtype):
    """Forward + backward with LoRA's branch; ``dense`` is the same on the weight itself."""
    x, weight = cases.linear(shape, dtype)
    terms = cases.low_rank(shape, dtype)
    made = weight if weight_format == "dense" else quantize_weight(weight, weight_format)
    cases.both(
        benchmark, f"quantized linear {shape} {dtype}",
        lambda: decomposed_linear(x, made, **terms), x, *terms.values(),
    )  # fmt: skip


@pytest.mark.parametrize("merged", [True, False], ids=["ours", "formed"])
def bench_merged_weight(benchmark, merged, shape, dtype):
    _, weight = cases.linear(shape, dtype)
    terms = cases.low_rank(shape, dtype)

    def ours():
        return merged_weight(weight, **terms, core=None, in_scale=None, out_scale=None,
                             scale=2.0, impl="auto")  # fmt: skip

    def formed():
        return weight + 2.0 * terms["up"] @ terms["down"]

    with torch.no_grad():
        cases.forward(benchmark, f"merged_weight {shape} {dtype}", ours if merged else formed)
