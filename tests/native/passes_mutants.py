"""Planted bugs in the device passes: each must make a check of its pass fail.

    PYTHONPATH=.:tests/native python tests/native/passes_mutants.py

A mutant is one edit of one file of csrc/cuda, built from a copy of csrc with that pass alone.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import passes_checks as checks
import torch
from emulator import HERE, ROOT, EmulationError, build


class Mutant(NamedTuple):
    check: str
    file: str
    what: str
    old: str
    new: str


MUTANTS = [
    Mutant("down", "down_projection.cuh", "no wait for the copies",
           "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    Mutant("down", "down_projection.cuh", "filled while it is read",
           "fetch(k + (kStages - 1) * kDepth);", "fetch(k + kStages * kDepth);"),
    Mutant("down", "down_projection.cuh", "no barrier before the product",
           "        });\n    __syncthreads();", "        });"),
    Mutant("down", "down_projection.cuh", "mask of the first step in all",
           "call.K + k + col, call.mask", "call.K + col, call.mask"),
    Mutant("down", "down_projection.cuh", "mask of the first rows in all",
           "(row0 + row) * call.K", "row * call.K"),
    Mutant("down", "down_projection.cuh", "not divided by the kept fraction",
           "sum * call.after", "sum"),
    Mutant("down", "down_projection.cuh", "no scale without a core", ": call.scale)", ": 1.0f)"),
    Mutant("down", "down_projection.cuh", "v of the sum before its rounding",
           "const float t = write(call.t, place, sum * call.after);",
           "write(call.t, place, sum * call.after);\n  const float t = 1.02f * sum * call.after;"),
    Mutant("down", "down_projection.cuh", "a share of K left out",
           "share < call.plan.shares", "share < call.plan.shares - 1"),
    Mutant("down", "down_projection.cu", "shares that overlap",
           "ceil_div(steps, shares) * depth", "ceil_div(steps, shares) * depth - depth / 2"),
    Mutant("down", "tile.cuh", "no zeros past the last column",
           "count * int(sizeof(S))", "count ? 16 : 0"),
    Mutant("down", "tile.cuh", "sixteen bytes where nothing is aligned",
           "if (!from.aligned) {", "if (false) {"),
    Mutant("down", "tile.cuh", "a part of float32 left out",
           "rest -= to_float(part[p].at[j]);", "rest -= p ? rest : to_float(part[p].at[j]);"),
    Mutant("down", "product.cuh", "two of three parts", "both >= 0; --both", "both >= 1; --both"),
    Mutant("down", "product.cuh", "fragments of b of one half",
           "&b[at_j + line][s + which % 2 * 8]", "&b[at_j + line][s]"),
    Mutant("walk", "column_walk.cuh", "no wait for the copies",
           "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();"),
    Mutant("walk", "column_walk.cuh", "u of the masked matrix",
           "with_u && with_c && call.mask.seed;", "false;"),
    Mutant("walk", "column_walk.cuh", "c of the unmasked matrix",
           "      prepare_big(true);", "      prepare_big(false);"),
    Mutant("walk", "column_walk.cuh", "no barrier before the mask",
           "    if (twice) {\n      __syncthreads();", "    if (twice) {"),
    Mutant("walk", "column_walk.cuh", "mask of the first strip in all",
           "call.N + col0 + col, call.mask", "call.N + col, call.mask"),
    Mutant("walk", "column_walk.cuh", "the scale of the first column in all",
           "to_float(vec.at[j]) * scale[j]", "to_float(vec.at[j]) * scale[0]"),
    Mutant("walk", "column_walk.cuh", "a group of rows left out of the sums",
           "group < GROUPS", "group < GROUPS - 1"),
    Mutant("walk", "column_walk.cuh", "the second sums over the first",
           "  __syncthreads();  // the place was a tile's or the sums' before\n", ""),
    Mutant("walk", "reduce.cuh", "a partial sum left out", "p < one.P", "p < one.P - 1"),
    Mutant("walk", "product.cuh", "fragments not transposed",
           "ldmatrix_x4_trans(right, ", "ldmatrix_x4(right, "),
    Mutant("walk", "column_walk.cu", "no zeros over no rows",
           "if (args.M == 0 || args.N == 0) return zero_sums(args, stream);",
           "if (args.M == 0 || args.N == 0) return cudaSuccess;"),
    Mutant("up", "up_expansion.cuh", "no mask", "if (call.mask.seed)", "if (false)"),
    Mutant("up", "up_expansion.cuh", "mask by tiles",
           "row * call.C + col + 4 * four, call.mask", "i * call.C + col + 4 * four, call.mask"),
    Mutant("up", "up_expansion.cuh", "the sums over the factors",
           "  __syncthreads();  // the sums take the place of the factors\n", ""),
    Mutant("up", "up_expansion.cuh", "the first ranks alone",
           "rank < call.R; rank += BR", "rank < call.R && rank < BR; rank += BR"),
    Mutant("up", "up_expansion.cuh", "a bias of 1 %",
           "value += read(call.bias, col + n)", "value += 1.01f * read(call.bias, col + n)"),
    Mutant("merge", "merged_weight.cuh", "no core", "to_float(vec.at[j]) * core",
           "to_float(vec.at[j])"),
    Mutant("merge", "merged_weight.cuh", "rows for columns in W",
           "call.weight_column_stride == 1", "true"),
    Mutant("merge", "merged_weight.cuh", "out_scale of the first row of a tile",
           "read(call.out_scale, row)", "read(call.out_scale, row0)"),
    Mutant("widen", "dequantize.cuh", "the second code first",
           "nf4_code(bytes.at[j / 2], j % 2)", "nf4_code(bytes.at[j / 2], 1 - j % 2)"),
    Mutant("widen", "dequantize.cuh", "bytes without a sign",
           "int8_value(int8_t(bytes.at[j]), absmax)",
           "int8_value(int8_t(bytes.at[j] & 127), absmax)"),
    Mutant("widen", "dequantize.cuh", "no limit on the codes",
           "if (aligned && first + BYTES <= end)", "if (true)"),
    Mutant("norm", "row_norm.cuh", "U once", "2.0f * call.U", "1.0f * call.U"),
    Mutant("norm", "row_norm.cuh", "no scale of the inner product",
           "call.scale * up_gram(up, call.G, call.R, rank)", "up_gram(up, call.G, call.R, rank)"),
    Mutant("norm", "row_norm.cuh", "a correction left out of dA",
           "+= call.scale * sum;", "+= 0.0f * sum;"),
    Mutant("norm", "warp.cuh", "half a warp", "distance = 16", "distance = 8"),
]  # fmt: skip

PASSES = {"down": 1, "walk": 2, "up": 3, "merge": 4, "widen": 5, "norm": 6}


def down(library):
    run = checks.down_projection
    run(library, "bf16", (70, 530), 7, drop=True, core=True, phi="gelu", sms=1)
    run(library, "bf16", (70, 200), 20, extra=8, want="v")
    run(library, "bf16-fp32", (66, 131), 33, drop=True, phi="silu", scaled=True)
    run(library, "fp16-fp32", (3, 72), 16)
    run(library, "bf16", (66, 131), 5, extra=5)
    run(library, "fp32", (70, 130), 5, drop=True)


def walk(library):
    run = checks.column_walk
    run(library, "bf16", (70, 264), 7, 20, drop=True, sums=True, other=True, sms=4)
    run(library, "bf16-fp32", (131, 67), 16, 5, sums=True, other=True, scaled=("big", "other"))
    run(library, "fp32", (40, 130), 0, 33, drop=True)
    run(library, "bf16", (0, 40), 3, 3, sums=True)


def up(library):
    run = checks.up_expansion
    run(library, "bf16", (130, 131), 40, drop=True, bias=True)
    run(library, "bf16-fp32", (70, 136), 16, is_up=True, bias=True, addend=True)
    run(library, "fp32", (66, 5), 3, bias=True)


def merge(library):
    run = checks.merged_weight
    run(library, "bf16", (70, 131), 20, core=True, scales=True)
    run(library, "fp32", (70, 136), 7, transposed=True)


def widen(library):
    checks.nf4(library, torch.bfloat16, (7, 131), 64)
    checks.int8(library, torch.bfloat16, (7, 131))


def norm(library):
    checks.row_norm(library, "bf16", (70, 131), 20, sms=2)


RUNS: dict[str, Callable] = {
    "down": down, "walk": walk, "up": up, "merge": merge, "widen": widen, "norm": norm,
}  # fmt: skip


FOUND, SURVIVES = 10, 11  # exit statuses that nothing else has


def survives(mutant: Mutant, folder: Path) -> bool:
    """Whether every check of the pass is content with the mutant.

    In a process of its own: each library's fibers keep their stacks for as long as it lasts, and a
    process cannot map more than about thirty libraries' stacks.
    """
    process = get_context("fork").Process(target=_run, args=(mutant, folder))
    process.start()
    process.join()
    assert process.exitcode in (FOUND, SURVIVES), f"{mutant.what}: exit status {process.exitcode}"
    return process.exitcode == SURVIVES


def _run(mutant: Mutant, folder: Path) -> None:
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    file = copy / "cuda" / mutant.file
    source = file.read_text()
    assert mutant.old in source, f"{mutant.file} no longer has {mutant.old!r}"
    file.write_text(source.replace(mutant.old, mutant.new))
    library = build(
        HERE / "passes_emulation.cpp",
        folder / "mutant.so",
        includes=(HERE, copy / "common", copy / "cuda"),
        flags=("-O0", "-Wno-error", f"-DPASS={PASSES[mutant.check]}"),
    )
    try:
        RUNS[mutant.check](library)
    except (AssertionError, EmulationError):
        sys.exit(FOUND)
    sys.exit(SURVIVES)


def main() -> int:
    survivors = []
    for mutant in MUTANTS:
        with tempfile.TemporaryDirectory() as folder:
            alive = survives(mutant, Path(folder))
        print(f"{'SURVIVES' if alive else 'found':9} {mutant.file}: {mutant.what}", flush=True)
        survivors += [mutant] if alive else []
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} planted bugs found")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
