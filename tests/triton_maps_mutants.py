"""Planted bugs in the kernels of the weight maps and of merging, for triton_mutants.py."""

import triton_maps_checks as checks
from triton_mutants import Mutant

MUTANTS = [
    Mutant("weight_tile", "1 % in dB", "d_up = dot_for(", "d_up = 1.01 * dot_for(", "hadamard"),
    Mutant("weight_tile", "no limit on the tokens", "inside = tokens < M",
           "inside = tokens < M + BLOCK_M", "hadamard"),
    Mutant("weight_tile", "dB of the tiles before forgotten", "(ranks < up_ranks)", "(ranks < 0)",
           "hadamard"),
    Mutant("weight_tile", "dA of the tiles before forgotten", "(ranks < down_ranks)",
           "(ranks < 0)", "hadamard"),
    Mutant("weight_tile", "dA on the first rank block alone", "mask=in_cols)",
           "mask=in_cols & (ranks < 16)[:, None])", "hadamard"),
    Mutant("weight_tile", "the first rank block alone", "in range(0, R, BLOCK_R)",
           "in range(0, min(R, BLOCK_R), BLOCK_R)", "hadamard"),
    Mutant("weight_tile", "core left out", "* core[None, :]", "* 1.0", "merged"),
    Mutant("weight_tile", "no limit on the rank", "        in_ranks = ranks < R\n        up",
           "        in_ranks = ranks < R + BLOCK_R\n        up", "hadamard"),
    Mutant("hadamard", "1 % in Q", "P * weight.to", "1.01 * P * weight.to", "hadamard"),
    Mutant("hadamard", "the last share of the columns left out", "d_up.sum(0)",
           "d_up[:-1].sum(0)", "hadamard"),
    Mutant("hadamard", "the last share of the rows left out", "d_down.sum(0)",
           "d_down[:-1].sum(0)", "hadamard"),
    Mutant("hadamard", "rows of the next share too", "min(first_row + n_share, N)",
           "min(first_row + 2 * n_share, N)", "hadamard"),
    Mutant("hadamard", "added to W", "multiplies=True", "multiplies=False", "hadamard"),
    Mutant("merged_weight", "1 % in the product", "change = scale *", "change = 1.01 * scale *",
           "merged"),
    Mutant("merged_weight", "in_scale left out", "built *= tl.load(in_scale_ptr",
           "built += 0.0 * tl.load(in_scale_ptr", "merged"),
    Mutant("merged_weight", "products of two parts", " and not EXACT", "", "merged"),
    Mutant("merged_weight", "a column left out", "rows < N, cols < K", "rows < N, cols < K - 1",
           "merged"),
    Mutant("double_hadamard", "1 % in T2", "P * other, up2_ptr", "1.01 * P * other, up2_ptr",
           "double"),
    Mutant("double_hadamard", "the last share left out", "part.sum(0)", "part[:-1].sum(0)",
           "double"),
    Mutant("double_hadamard", "T2 begins anew with each tile",
           "tl.where(col > first_col, R2, 0)", "0", "double"),
    Mutant("block_rotate", "1 % in a turn", "narrow(turned, out_ptr", "narrow(1.01 * turned, "
           "out_ptr", "rotate"),
    Mutant("block_rotate", "blocks run into each other",
           "mask=same & in_taken[:, None] & in_to[None, :], other=0.0",
           "mask=in_taken[:, None] & in_to[None, :], other=0.0", "rotate"),
    Mutant("block_rotate", "columns not put back", "to_column[None, :], narrow",
           "to[None, :], narrow", "rotate"),
    Mutant("block_rotate", "not transposed", "m.blocks[j].mT if", "m.blocks[j] if", "rotate"),
    Mutant("block_rotate", "the last share left out", "partial.sum(0)", "partial[:-1].sum(0)",
           "rotate"),
    Mutant("block_rotate", "the last rows alone", "d_blocks[j] +=", "d_blocks[j] =", "rotate"),
    Mutant("block_rotate", "no limit on the rows", ".to(tl.int64)\n        in_rows = rows < M",
           ".to(tl.int64)\n        in_rows = rows < M + BLOCK_M", "rotate"),
    Mutant("singular_diagonal", "1 % in a sum", "turned * left", "1.01 * turned * left",
           "singular"),
    Mutant("singular_diagonal", "the tiles before forgotten", "ranks < summed", "ranks < 0",
           "singular"),
    Mutant("singular_diagonal", "the last program left out", "total.sum(0)", "total[:-1].sum(0)",
           "singular"),
    Mutant("singular_diagonal", "1 % by tokens", "column_walk(u,", "column_walk(1.01 * u,",
           "singular"),
    Mutant("scatter", "1 % in the values", "+ tl.load(values_ptr", "+ 1.01 * tl.load(values_ptr",
           "scatter"),
    Mutant("scatter", "a token too many", "tokens < M)", "tokens < M + 1)", "scatter"),
    Mutant("scatter", "the last value left out", "inside = at < V", "inside = at < V - 1",
           "scatter"),
]  # fmt: skip


def run(check: str) -> None:
    """The checks that a mutant of this kind must fail: a few of those that the tests run."""
    for dtype in ("fp32", "bf16"):
        if check == "hadamard":
            with checks.walking("hadamard"):
                checks.hadamard(dtype, 20, (33, 70, 37))
        elif check == "double":
            with checks.walking("double_hadamard"):
                checks.double_hadamard(dtype, 5, (33, 70, 9))
        elif check == "merged":
            checks.merged_weight(dtype, 20, (33, 70, 0), True)
        elif check == "rotate":
            with checks.walking("block_rotate", ELEMENTS=70 * 36):
                checks.block_rotate(dtype, (2, 12, 3), 80, True)
        elif check == "singular":
            with checks.walking("singular_diagonal", RANKS=8):
                checks.singular_diagonal(dtype, 40, (33, 70, 100), False)
                checks.singular_diagonal(dtype, 20, (33, 70, 3), True)
        elif check == "scatter":
            checks.scatter(dtype, 50, (33, 70, 100))
