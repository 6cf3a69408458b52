"""W with values added at (rows, cols), and their gradients (maths: reference/scatter.py).

    W_eff[rows_j, cols_j] = W[rows_j, cols_j] + values_j
    d_values_j = sum_m g[m, rows_j] x[m, cols_j]

One program owns BLOCK_V values.  No pair comes twice, so none waits for another.  The gradients
read columns of g and x, which lie side by side in transposed copies.

    W: (N, K) of any strides    rows, cols: (V,) int64    g: (M, N)    x: (M, K)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.factors import Scatter
from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles


@triton.jit
def _build_kernel(
    weight_ptr, rows_ptr, cols_ptr, values_ptr, built_ptr,
    V, K, stride_n, stride_k,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = at < V
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    cols = tl.load(cols_ptr + at, mask=inside, other=0)
    changed = tl.load(weight_ptr + rows * stride_n + cols * stride_k, mask=inside, other=0.0)
    changed = changed.to(tl.float32) + tl.load(values_ptr + at, mask=inside, other=0.0)
    dtype: tl.constexpr = built_ptr.dtype.element_ty
    tl.store(built_ptr + rows * K + cols, narrow(changed, dtype), mask=inside)


@triton.jit
def _contract_kernel(
    g_ptr, x_ptr, rows_ptr, cols_ptr, total_ptr,
    V, M,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = at < V
    rows = tl.load(rows_ptr + at, mask=inside, other=0)
    cols = tl.load(cols_ptr + at, mask=inside, other=0)
    total = tl.zeros((BLOCK_V, BLOCK_M), tl.float32)
    for start in range(0, M, BLOCK_M):
        tokens = start + tl.arange(0, BLOCK_M)
        both = inside[:, None] & (tokens < M)[None, :]
        g = tl.load(g_ptr + rows[:, None] * M + tokens[None, :], mask=both, other=0.0)
        x = tl.load(x_ptr + cols[:, None] * M + tokens[None, :], mask=both, other=0.0)
        total += g.to(tl.float32) * x.to(tl.float32)
    tl.store(total_ptr + at, tl.sum(total, 1), mask=inside)


def build(m: Scatter, weight: Tensor) -> Tensor:
    built = weight.clone(memory_format=torch.contiguous_format)
    V = m.values.shape[0]
    config = configuration("scatter", weight.device, m.values.dtype)
    if V:
        _build_kernel[(triton.cdiv(V, config["BLOCK_V"]),)](
            weight, m.rows.contiguous(), m.cols.contiguous(), m.values.contiguous(), built,
            V, weight.shape[1], weight.stride(0), weight.stride(1),
            BLOCK_V=config["BLOCK_V"], **launch_options(config),
        )  # fmt: skip
    return built


def contract(m: Scatter, weight: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """d_values of g [M, N] and x [M, K]."""
    V, M = m.values.shape[0], g.shape[0]
    total = torch.empty(V, dtype=torch.float32, device=g.device)
    config = configuration("scatter", weight.device, m.values.dtype)
    if V:
        _contract_kernel[(triton.cdiv(V, config["BLOCK_V"]),)](
            g.T.contiguous(), x.T.contiguous(), m.rows.contiguous(), m.cols.contiguous(), total,
            V, M, **tiles(config), **launch_options(config),
        )  # fmt: skip
    return total.to(m.values.dtype)


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    for dtypes, (wide, adapter) in DTYPES.items():
        pairs = {"rows_ptr": "*i64", "cols_ptr": "*i64", "V": "i32"}
        types = {
            **pairs, "weight_ptr": f"*{wide}", "built_ptr": f"*{wide}",
            "values_ptr": f"*{adapter}", "K": "i32", "stride_n": "i32", "stride_k": "i32",
        }  # fmt: skip
        options = launch_options(config)
        yield Specimen(
            f"{dtypes} build", _build_kernel, types, {"BLOCK_V": config["BLOCK_V"]}, options,
            unit=("stride_k",), multiplies=False,
        )  # fmt: skip
        types = dict.fromkeys(("g_ptr", "x_ptr"), f"*{wide}") | {"total_ptr": "*fp32", "M": "i32"}
        types |= pairs
        yield Specimen(
            f"{dtypes} contract", _contract_kernel, types, tiles(config), options, multiplies=False
        )
