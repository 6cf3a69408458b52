"""Planted bugs of kernels/triton/grouped_linear.py; see triton_mutants.py."""

import grouped_checks as checks
from triton_mutants import Mutant

FILE = "grouped_linear"
MUTANTS = [
    Mutant(FILE, "in_scale left out of t", "down, layer.in_scale, layer.seed",
           "down, None, layer.seed", "group"),
    Mutant(FILE, "1 % in v", "layer.core, layer.scale,", "layer.core, 1.01 * layer.scale,",
           "group"),
    Mutant(FILE, "another layer's scale", "            layer.scale,",
           "            layers[0].scale,", "group"),
    Mutant(FILE, "no mask in dX", "layers[i].down, layers[i].seed", "layers[i].down, None",
           "group"),
    Mutant(FILE, "no mask in dA", "Left(dts[i], layer.seed,", "Left(dts[i], None,", "group"),
    Mutant(FILE, "the last branch left out of dX", "up_expansions(parts,",
           "up_expansions(parts[: max(1, len(parts) - 1)],", "group"),
    Mutant(FILE, "a base GEMM left out", "for i in some:", "for i in some[:1]:", "group"),
    Mutant(FILE, "in_scale left out of dA", "d_down * layer.in_scale", "d_down", "group"),
    Mutant(FILE, "a layer's dx left out", "d_X if d_x is None else d_x.add_(d_X)",
           "d_X if d_x is None else d_x", "group"),
]  # fmt: skip


def run(check: str) -> None:
    checks.check(checks.LAYERS, "fp32", "triton:passes")
