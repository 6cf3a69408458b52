"""Planted bugs in csrc/cuda/mma_*: each must make a check fail.  python tests/native/mma_mutants.py

A mutant is one edit of one file, built from a copy of csrc/cuda that has bf16 and one tile alone.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import mma_checks as checks
import torch
from emulator import HERE, INCLUDES, ROOT, EmulationError, build

TERMS = ("addend", "out_scale", "bias", "z")


class Mutant(NamedTuple):
    file: str
    what: str
    old: str
    new: str


MUTANTS = [
    Mutant("mainloop.cuh", "one wait too short in the loop",
           "    cp_async_wait<Tile::kStages - 2>();", "    cp_async_wait<Tile::kStages - 1>();"),
    Mutant("mainloop.cuh", "no wait before the loop", "\n  cp_async_wait<Tile::kStages - 2>();",
           "\n"),
    Mutant("mainloop.cuh", "barrier in the loop removed", "    __syncthreads();", ""),
    Mutant("mainloop.cuh", "barrier before the loop removed", "\n  __syncthreads();", "\n"),
    Mutant("mainloop.cuh", "the next stage overwritten", "= step + Tile::kStages - 1;",
           "= step + Tile::kStages;"),
    Mutant("mainloop.cuh", "fragments of the wrong stage", "stage(step), 16, warp",
           "stage(step + 1), 16, warp"),
    Mutant("mainloop.cuh", "the first half twice", "stage(step), 16, warp", "stage(step), 0, warp"),
    Mutant("mainloop.cuh", "no rank zero-fill", "count * int(sizeof(T))", "count ? 16 : 0"),
    Mutant("mainloop.cuh", "no zero-fill of single elements", "if (i < count) pairs", "pairs"),
    Mutant("mainloop.cuh", "no limit on rows", "source_row + i * kApart < from.rows ? inside",
           "source_row < 1 << 30 ? inside"),
    Mutant("mainloop.cuh", "aligned or not, sixteen bytes", "if (from.chunks) {", "if (true) {"),
    Mutant("mainloop.cuh", "mask by columns", "uint64_t(row) * uint64_t(cols) + uint64_t(col)",
           "uint64_t(col) * uint64_t(cols) + uint64_t(row)"),
    Mutant("mainloop.cuh", "mask of the warp above", "{corner.row + warp.row, corner.col",
           "{corner.row, corner.col"),
    Mutant("mainloop.cuh", "mask on everything", "step + 1 == product.rank_steps",
           "step + 1 == product.steps"),
    Mutant("mainloop.cuh", "mask a step early", "step + 1 == product.rank_steps",
           "step + 2 == product.rank_steps"),
    Mutant("mainloop.cuh", "an odd row's word", "lane == 3 ? mask_word(seed, first / 4 + 1) : word",
           "word"),
    Mutant("mainloop.cuh", "fragments not transposed", "ldmatrix_x4_trans(", "ldmatrix_x4("),
    Mutant("mainloop.cuh", "no tile below the first", "corner.row + i * 16 + left.row",
           "corner.row + left.row"),
    Mutant("tiles.h", "left fragment transposed", "{lane % 16, lane / 16}",
           "{lane % 8 + lane / 16 * 8, lane / 8 % 2}"),
    Mutant("tiles.h", "right fragment transposed", "{lane % 8 + lane / 16 * 8, lane / 8 % 2}",
           "{lane % 16, lane / 16}"),
    Mutant("tiles.h", "sums transposed", "{lane / 4, lane % 4 * 2}", "{lane % 8, lane / 8 * 2}"),
    Mutant("tiles.h", "steps that overlap", "(step - rank_steps) * kDepth", "step * kDepth"),
    Mutant("tiles.h", "no last step", "(size + tile - 1) / tile", "size / tile + (size < tile)"),
    Mutant("tiles.h", "a tile twice", "int(first + within % rows)", "int(first)"),
    Mutant("epilogue.cuh", "bias before scale", "own.scale[i] * sums[i] + own.bias[i]",
           "own.scale[i] * (sums[i] + own.bias[i])"),
    Mutant("epilogue.cuh", "scale for z", "store_chunk(z, row, col, count, sums)",
           "store_chunk(z, row, col, count, own.scale)"),
    Mutant("epilogue.cuh", "no addend", "sums[i] += added[i]", "sums[i] += 0.0f * added[i]"),
    Mutant("epilogue.cuh", "d_in_scale after in_scale", "own.sums[i] += inputs[i] * sums[i]",
           "own.sums[i] += inputs[i] * sums[i] * own.scale[i]"),
    Mutant("epilogue.cuh", "no limit on rows stored", "if (row < rows && count > 0)",
           "if (count > 0)"),
    Mutant("epilogue.cuh", "eight columns always", "to.chunks && count == kChunk", "to.chunks"),
    Mutant("epilogue.cuh", "half of the lanes summed", ", own.sums[i], 16)", ", own.sums[i], 8)"),
    Mutant("epilogue.cuh", "one row of warps summed", "down < Tile::kWarpsDown", "down < 1"),
    Mutant("epilogue.cuh", "no barrier before the warps' sum", "    __syncthreads();", ""),
    Mutant("epilogue.cuh", "no wait for the warp's rows", "    __syncwarp();\n#pragma", "#pragma"),
    Mutant("epilogue.cuh", "rows staged over rows read", "    }\n    __syncwarp();", "    }"),
    Mutant("gemm.cuh", "the last part left out", "tile < row_tiles", "tile < row_tiles - 1"),
    Mutant("gemm.cuh", "no sum over no rows", "if (a.K == 0) return 0;",
           "if (a.K == 0 || a.M == 0) return 0;"),
    Mutant("arguments.h", "a workspace for larger tiles", "tiles_over(a.M, SmallTile::kRows)",
           "tiles_over(a.M, WideTile::kRows)"),
]  # fmt: skip

# One of each kind, for the suite of every day; the others are a matter of minutes.
FIRST = {
    "one wait too short in the loop", "barrier in the loop removed", "the next stage overwritten",
    "fragments of the wrong stage", "no rank zero-fill", "no limit on rows", "mask by columns",
    "right fragment transposed", "bias before scale", "no barrier before the warps' sum",
}  # fmt: skip

# The copy's instances: what the checks below use, so that a mutant is built in a second or two.
FEWER = {
    "mma_gemm.cuh": [
        ("if (choice == TileChoice::kWide) return of(WideTile{});", ""),
        ("if (choice == TileChoice::kSquare) return of(SquareTile{});", ""),
        ("a.dtype == Dtype::kHalf ? forward_of<fp16>(a, choice, launch)", "false ? 0"),
        ("a.dtype == Dtype::kHalf ? input_gradient_of<fp16>(a, choice, parts, launch)",
         "false ? 0"),
    ],
}  # fmt: skip


def library(folder: Path, mutant: Mutant | None):
    """The emulation with the mutant in it, or without one."""
    sources = folder / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", sources)
    edits = {name: list(pairs) for name, pairs in FEWER.items()}
    if mutant is not None:
        edits.setdefault(f"mma_{mutant.file}", []).append((mutant.old, mutant.new))
    for name, pairs in edits.items():
        file = sources / name
        text = file.read_text("utf-8")
        for old, new in pairs:
            assert old in text, f"{name} has no {old!r}: renew the mutant"
            text = text.replace(old, new)
        file.write_text(text, "utf-8")
    includes = [sources, *(i for i in INCLUDES if i.name != "cuda")]
    flags = ["-O0", "-Wno-error"]
    return build(HERE / "mma_emulation.cpp", folder / "mma.so", includes=includes, flags=flags)


def run(made) -> None:
    """The checks that every mutant must fail one of."""
    checks.forward(made, sizes=(133, 150, 258), r=7, terms=TERMS, order=5)
    options = {"terms": ("d_x", "d_in_scale"), "order": 5}
    for K in (258, 131):
        checks.input_gradient(made, sizes=(133, K, 150), r=40, dropping=True, **options)
    checks.forward(made, sizes=(70, 41, 131), r=7, padding=lambda cols: 0)
    checks.input_gradient(made, sizes=(640, 8, 8), r=0, **options)
    checks.input_gradient(made, sizes=(0, 8, 8), r=0, **options)


def survives(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        made = library(Path(folder), mutant)
        try:
            run(made)
        except (AssertionError, EmulationError):
            return False
    return True


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(library(Path(folder), None))  # passes on the kernels as they are
    survivors = 0
    for mutant in MUTANTS:
        alive = survives(mutant)
        survivors += alive
        print(
            f"{'SURVIVES' if alive else 'found':<9} mma_{mutant.file:<14} {mutant.what}", flush=True
        )
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
