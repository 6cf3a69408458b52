"""Planted bugs of kernels/triton/decode.py: each must make a check fail."""

import triton_decode_checks as checks
from triton_mutants import Mutant

FILE = "decode"
MUTANTS = [
    Mutant(FILE, "1 % in the bias", "y += tl.load(bias_ptr", "y += 1.01 * tl.load(bias_ptr",
           "terms"),
    Mutant(FILE, "1 % in the branch", "PHI) * scale", "PHI) * scale * 1.01", "terms"),
    Mutant(FILE, "no limit on K", "mask=(ks < K)[:, None] & in_cols[None, :]",
           "mask=(ks >= 0)[:, None] & in_cols[None, :]", "gaps"),
    Mutant(FILE, "no limit on K in A", "mask=(ks < K)[:, None] & (ranks < R)",
           "mask=(ks >= 0)[:, None] & (ranks < R)", "gaps"),
    Mutant(FILE, "the last share left out", "for _ in range(splits)",
           "for _ in range(max(1, splits - 1))", "terms"),
    Mutant(FILE, "shares overlap", "min(first + k_blocks * BLOCK_K, K)",
           "min(first + 2 * k_blocks * BLOCK_K, K)", "terms"),
    Mutant(FILE, "the last but one finishes", "2 * WARPS * programs - 1",
           "2 * WARPS * (programs - 1) - 1", "terms"),
    Mutant(FILE, "counters not reset", "tl.store(arrived_ptr + tile, 0)",
           "tl.store(arrived_ptr + tile, 1)", "terms"),
    Mutant(FILE, "the first rank block alone", "for block in range(0, R, BLOCK_R)",
           "for block in range(0, min(R, BLOCK_R), BLOCK_R)", "terms"),
    Mutant(FILE, "t of the first rank block alone", "for block in range(BLOCK_R, R, BLOCK_R)",
           "for block in range(R, R, BLOCK_R)", "terms"),
    Mutant(FILE, "t stored by the second strip", "if tile == 0:", "if tile == 1:",
           "terms"),
    Mutant(FILE, "core left out", "v *= core", "v *= 1.0 + 0.0 * core", "terms"),
    Mutant(FILE, "in_scale left out of the base", "narrow(x * by[None, :],",
           "narrow(x * 1.0 + 0.0 * by[None, :],", "terms"),
    Mutant(FILE, "in_scale left out of the branch", "narrow(down * by[:, None],",
           "narrow(down * 1.0 + 0.0 * by[:, None],", "terms"),
    Mutant(FILE, "in_scale twice in the branch", "t = _project(x, down_ptr, in_scale_ptr, 0",
           "t = _project(x * 2.0, down_ptr, in_scale_ptr, 0", "terms"),
    Mutant(FILE, "z with out_scale", "tl.store(z_ptr + place, narrow(z,",
           "tl.store(z_ptr + place, narrow(2.0 * z,", "terms"),
    Mutant(FILE, "addend left out", "z += tl.load(addend_ptr", "z += 0.0 * tl.load(addend_ptr",
           "terms"),
    Mutant(FILE, "v rounded to bf16", "z = dot_for(v, up, z,",
           "z = dot_for(narrow(v, tl.bfloat16), up.to(tl.bfloat16), z,", "precision"),
    Mutant(FILE, "z rounded before the addend", "            z += tl.load(addend_ptr",
           "            z = narrow(z, tl.bfloat16).to(tl.float32) + tl.load(addend_ptr",
           "precision"),
    Mutant(FILE, "no phi", "PHI=ACTIVATIONS.index(activation)", "PHI=0", "activations"),
]  # fmt: skip


def run(check: str) -> None:
    if check == "terms":
        for dtype, N in (("fp32", 20), ("bf16-fp32", 70)):
            checks.decode(dtype, 40, (3, 150, N), activation="identity")
    elif check == "gaps":
        checks.gaps()
    elif check == "precision":
        checks.cancelling_terms()
    elif check == "activations":
        checks.activations()
