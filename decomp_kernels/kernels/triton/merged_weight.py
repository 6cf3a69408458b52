"""Weights that are built tile by tile, in one read of W and one rounding:

    out = out_scale * (W + scale * (up * core) down) * in_scale             a merged linear
    out = W * (1 + scale * up down)                                         Hadamard
    out = W + scale * (up down) * (up2 down2)                               DoubleHadamard

One program owns a tile of ``out`` and walks the rank in blocks; the products stay in registers.

    W, out: (N, K), W of any strides    up: (N, r)    down: (r, K)    core: (r,)
    in_scale: (K,)    out_scale: (N,)
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from decomp_kernels.kernels.triton.configurations import configuration
from decomp_kernels.kernels.triton.pieces import narrow
from decomp_kernels.kernels.triton.specimens import DTYPES, Specimen, launch_options, tiles
from decomp_kernels.kernels.triton.weight_tile import matched, product_tile


@triton.jit
def _kernel(
    weight_ptr, up_ptr, core_ptr, down_ptr, up2_ptr, down2_ptr, in_scale_ptr, out_scale_ptr,
    out_ptr,
    N, K, R, R2, stride_n, stride_k, scale,
    MULTIPLIES: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = (out_ptr.dtype.element_ty != tl.float32) and not EXACT
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows, in_cols = rows < N, cols < K
    inside = in_rows[:, None] & in_cols[None, :]
    place = rows[:, None] * stride_n + cols[None, :].to(tl.int64) * stride_k
    built = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if up_ptr is not None:
        change = scale * product_tile(
            up_ptr, core_ptr, down_ptr, rows, cols, N, K, R, NARROW, BLOCK_R
        )
        if up2_ptr is not None:
            change *= product_tile(up2_ptr, None, down2_ptr, rows, cols, N, K, R2, NARROW, BLOCK_R)
        if MULTIPLIES:
            change *= built
        built += change
    if out_scale_ptr is not None:
        built *= tl.load(out_scale_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if in_scale_ptr is not None:
        built *= tl.load(in_scale_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * K + cols[None, :]
    tl.store(out, narrow(built, out_ptr.dtype.element_ty), mask=inside)


def merged_weight(
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    core: Tensor | None,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """out_scale * (W + scale * up core down) * in_scale, [N, K] in W's dtype, float32 inside."""
    pair = None if up is None or down is None else (up, down)
    return built(
        weight, pair, core=core, in_scale=in_scale, out_scale=out_scale, scale=scale, exact=True
    )


def built(
    weight: Tensor,
    pair: tuple[Tensor, Tensor] | None,
    second: tuple[Tensor, Tensor] | None = None,
    *,
    core: Tensor | None = None,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    scale: float = 1.0,
    multiplies: bool = False,
    exact: bool = False,
) -> Tensor:
    """One of the module's formulas, [N, K] in W's dtype.  pair, second: (up, down).

    exact: products in float32 also where the result is rounded to 16 bits.
    """
    N, K = weight.shape
    up, down = (None, None) if pair is None else matched(*pair)
    if exact and up is not None and down is not None:
        up, down = up.float(), down.float()
    up2, down2 = (None, None) if second is None else matched(*second)
    R, R2 = (0 if t is None else t.shape[1] for t in (up, up2))
    out = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    small = [t.dtype for t in (up, up2) if t is not None] or [torch.float32]
    adapter = small[0] if len({*small}) == 1 else torch.float32
    config = configuration("merged_weight", weight.device, adapter, M=N, r=max(R, R2))
    if N and K:
        _kernel[(triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(K, config["BLOCK_K"]))](
            weight, up, core, down, up2, down2, in_scale, out_scale, out,
            N, K, R, R2, weight.stride(0), weight.stride(1), scale,
            MULTIPLIES=multiplies, EXACT=exact, **tiles(config), **launch_options(config),
        )  # fmt: skip
    return out


def specimens(config: dict[str, Any]) -> Iterator[Specimen]:
    optional = ("core", "up2", "down2", "in_scale", "out_scale")
    for dtypes, (wide, adapter) in DTYPES.items():
        small = f"*{adapter}"
        for name, has in (
            ("exact", dict.fromkeys(("core", "in_scale", "out_scale"), "*fp32")),
            ("diagonal", {"core": "*fp32"}),
            ("second", {"up2": small, "down2": small}),
            ("hadamard", {}),
        ):
            exact = name == "exact"
            if exact and adapter != "fp32":
                continue
            types = {
                "weight_ptr": f"*{wide}", "up_ptr": small, "down_ptr": small, "out_ptr": f"*{wide}",
                **{f"{tensor}_ptr": dtype for tensor, dtype in has.items()},
                **dict.fromkeys(("N", "K", "R", "R2", "stride_n", "stride_k"), "i32"),
                "scale": "fp32",
            }  # fmt: skip
            constants = {
                **{f"{tensor}_ptr": None for tensor in optional if tensor not in has},
                "MULTIPLIES": name == "hadamard", "EXACT": exact, **tiles(config),
            }  # fmt: skip
            yield Specimen(
                f"{dtypes} {name}", _kernel, types, constants, launch_options(config),
                unit=("stride_k",), multiplies=not exact,
            )  # fmt: skip
