"""Planted bugs of kernels/triton/gram.py: each must make a check fail."""

import triton_gram_checks as checks
from triton_mutants import Mutant

FILE = "gram"
MUTANTS = [
    Mutant(FILE, "1 % in the penalty", "part = tl.sum(tl.sum(E * E", "part = 1.01 * tl.sum(tl.sum("
           "E * E", "gram"),
    Mutant(FILE, "1 % in the gradient", "factor = 4.0 * scale", "factor = 4.04 * scale", "gram"),
    Mutant(FILE, "the identity left in", "E - 1.0, 0.0)", "E, 0.0)", "gram"),
    Mutant(FILE, "the diagonal left in", "tl.where(identity, E - 1.0, 0.0)", "E - 1.0", "gram"),
    Mutant(FILE, "no limit on the rank", "E = tl.where(inside, E, 0.0)", "E = E", "gram"),
    Mutant(FILE, "one past L", "left, longs, R, L, stride", "left, longs, R, L + 1, stride",
           "gaps"),
    Mutant(FILE, "one past r", "inner, longs, R, L, stride", "inner, longs, R + 1, L, stride",
           "gaps"),
    Mutant(FILE, "tiles off the diagonal once", "part = 2.0 * part", "part = part", "gram"),
    Mutant(FILE, "the lower half not transposed", "wide_right * R + wide_left, E",
           "wide_left * R + wide_right, E", "gram"),
    Mutant(FILE, "the first piece of L alone", "for start in range(0, L, BLOCK_L)",
           "for start in range(0, min(L, BLOCK_L), BLOCK_L)", "gram"),
    Mutant(FILE, "the first rank block alone", "for start in range(0, R, BLOCK_R)",
           "for start in range(0, min(R, BLOCK_R), BLOCK_R)", "gram"),
    Mutant(FILE, "the norm of one block", "for start in range(0, count, BLOCK)",
           "for start in range(0, min(count, BLOCK), BLOCK)", "norm"),
    Mutant(FILE, "the norm's gradient twice", "factor / (2.0 * norm)", "factor / norm", "gram"),
    Mutant(FILE, "0 / 0", "tl.where(norm > 0.0, factor / (2.0 * norm), 0.0)",
           "factor / (2.0 * norm)", "zero"),
    Mutant(FILE, "squares for norms", "(of_matrix if squared else of_matrix.sqrt()).sum()",
           "of_matrix.sum()", "gram"),
    Mutant(FILE, "norm of the sum", "(of_matrix if squared else of_matrix.sqrt()).sum()",
           "(of_matrix.sum() if squared else of_matrix.sum().sqrt())", "gram"),
    Mutant(FILE, "ups read as downs", "R, L = M.shape if of_rows else M.T.shape",
           "R, L = M.shape if of_rows else (M.shape[1], M.shape[0] - 1)", "gram"),
    Mutant(FILE, "the stride of packed rows", "M.data_ptr(), M.stride(0), M",
           "M.data_ptr(), M.shape[1], M", "gaps"),
    Mutant(FILE, "strides taken for whole groups", "runs = stride * size % 16 == M.shape[1] * size "
           "% 16 == 0", "runs = True", "gram"),
    Mutant(FILE, "one matrix's place for another's", "residuals[index][place]",
           "residuals[index][0]", "gram"),
    Mutant(FILE, "E in bf16", "acc = dot_for(E, M, acc,",
           "acc = dot_for(narrow(E, tl.bfloat16).to(tl.float32), M, acc,", "gram"),
]  # fmt: skip


def run(check: str) -> None:
    if check == "gram":
        for kind, squared in (("o", False), ("d", True)):
            shapes = [(35, 70, 33), (2, 90, 12), (35, 70, 33), (3, 21, 150)]
            checks.gram(*checks.make(checks.DTYPES["fp32"], shapes), kind, squared)
    elif check == "norm":
        checks.gram(*checks.make(checks.DTYPES["bf16"], [(70, 9, 5)]), squared=False)
    elif check == "gaps":
        checks.gaps()
    elif check == "zero":
        checks.exact_zero()
