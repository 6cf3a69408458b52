"""Planted bugs of the fused kernels; python tests/triton_mutants.py tries these as well."""

import triton_checks
import triton_fused_checks as checks
from triton_mutants import Mutant

FORWARD, GRADIENT, TILES = "fused_forward", "fused_input_gradient", "fused_tiles"
MUTANTS = [
    Mutant(TILES, "1 % in the base product", "acc = dot(left, right, acc)",
           "acc = dot(left, right, acc) * 1.01", "forward"),
    Mutant(TILES, "no limit on the base product", "mask=(row < rows)[:, None] & (col < cols)",
           "mask=(row < rows)[:, None] & (col < 2 * cols)", "forward"),
    Mutant(TILES, "in_scale left out", "scale[None, :], left.dtype", "1.0, left.dtype", "forward"),
    Mutant(TILES, "1 % in scale", "v.to(tl.float32) * scale", "v.to(tl.float32) * (1.01 * scale)",
           "forward"),
    Mutant(TILES, "the first rank block alone", "tl.range(0, R, BLOCK,",
           "tl.range(0, min(R, BLOCK), BLOCK,", "forward"),
    Mutant(TILES, "a group of tiles too few", "rows = min(row_tiles - first, GROUP)",
           "rows = GROUP", "groups"),
    Mutant(TILES, "parts in another order", "_halves(left) + _halves(right)",
           "_halves(right) + _halves(left)", "parts"),
    Mutant(TILES, "descriptors in tiles of the wrong side", "source.load([first_row, first_col])",
           "source.load([first_col, first_row])", "descriptors"),
    Mutant(FORWARD, "no rank-r step", "if v_ptr is not None", "if v_ptr is None", "forward"),
    Mutant(FORWARD, "1 % in the addend", "acc += tl.load(addend_ptr",
           "acc += 1.01 * tl.load(addend_ptr", "forward"),
    Mutant(FORWARD, "1 % in out_scale", "acc *= tl.load(", "acc *= 1.01 * tl.load(", "forward"),
    Mutant(FORWARD, "1 % in the bias", "acc += tl.load(bias_ptr", "acc += 1.01 * tl.load(bias_ptr",
           "forward"),
    Mutant(FORWARD, "1 % in z", "narrow(acc, z_ptr.", "narrow(acc * 1.01, z_ptr.", "forward"),
    Mutant(FORWARD, "the last tile left out", "row_tiles * col_tiles, tl.num",
           "row_tiles * col_tiles - 1, tl.num", "forward"),
    Mutant(GRADIENT, "mask of column 0", "keep_mask(seed, rows, first_col",
           "keep_mask(seed, rows, 0 * first_col", "dropout"),
    Mutant(GRADIENT, "mask of row 0", "keep_mask(seed, rows, first_col",
           "keep_mask(seed, rows - first_row, first_col", "dropout"),
    Mutant(GRADIENT, "no mask", "acc = tl.where(kept, acc, 0.0)", "acc = acc", "dropout"),
    Mutant(GRADIENT, "1 % in in_scale", "acc *= tl.load(", "acc *= 1.01 * tl.load(", "gradient"),
    Mutant(GRADIENT, "the last row of tiles left out of d_in_scale", "parts.sum(0)",
           "parts[: max(1, len(parts) - 1)].sum(0)", "gradient"),
    Mutant(GRADIENT, "d_in_scale from d_x", "tl.sum(x * acc, 0)", "tl.sum(1.01 * x * acc, 0)",
           "gradient"),
    Mutant(GRADIENT, "in_scale forgotten in d_x", "if in_scale_ptr is not None",
           "if in_scale_ptr is None", "gradient"),
    Mutant("decomposed_linear_fused", "scale used twice with a core",
           "activation=activation), 1.0", "activation=activation), scale", "operator"),
    Mutant("decomposed_linear_fused", "dropout forgotten in dA",
           "left=dt, seed=seed, dropout=dropout", "left=dt", "operator"),
    Mutant("decomposed_linear_fused", "few rows: bias forgotten",
           "x, weight, bias, down, up, core,", "x, weight, None, down, up, core,", "few"),
    Mutant("decomposed_linear_fused", "no mask in backward", "seed=seed, dropout=dropout,\n",
           "\n", "operator"),
    Mutant("decomposed_linear_fused", "the addend's gradient without out_scale",
           "g = columns.scale_columns(dy, out_scale)", "pass", "operator"),
]  # fmt: skip


def run(check: str) -> None:
    """The checks that a mutant of this kind must fail."""
    if check == "forward":
        for dtype, sizes, r in (("fp32", (20, 35, 70), 20), ("bf16-fp32", (135, 36, 33), 3)):
            checks.forward(dtype, r, sizes)
    elif check == "gradient":
        checks.input_gradient("fp32", 20, (70, 35, 20))
    elif check == "dropout":
        checks.input_gradient("fp32", 3, (70, 67, 20), ("rank",), dropping=True)
        checks.input_gradient("fp32", 3, (70, 132, 20), ("rank",), dropping=True)
    elif check == "groups":  # more rows of tiles than a group has, and more tiles than programs
        checks.forward("fp32", 3, (520, 5, 130), ("bias",))
    elif check == "parts":
        checks.forward("bf16", 3, (20, 40, 264), arch="sm_90")
    elif check == "descriptors":
        checks.forward("bf16", 3, (70, 72, 40), ("rank",), arch="sm_90")
    elif check == "few":
        triton_checks.operator("fp32", False, "triton:fused", rows=5)
    elif check == "operator":
        triton_checks.operator("fp32", True, "triton:fused")
