"""Planted bugs: each must make a check of its kernel fail.  python tests/triton_mutants.py

A mutant is one edit of one file of kernels/triton, loaded from a copy of that folder.  Files named
triton_<topic>_mutants.py beside this one hold the MUTANTS of further kernels and the ``run`` that
each must make fail.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import triton_checks as checks

SHARED = "decomp_kernels.kernels"
PACKAGE = f"{SHARED}.triton"


class Mutant(NamedTuple):
    file: str
    what: str
    old: str
    new: str
    check: str


MUTANTS = [
    Mutant("down_projection", "1 % in the sum", "narrow(acc * b.after,",
           "narrow(acc * b.after * 1.01,", "down"),
    Mutant("down_projection", "no limit on K", "inside = cols < K", "inside = cols >= 0", "down"),
    Mutant("down_projection", "no mask", "tl.where(kept, x, 0.0)", "tl.where(kept, x, x)", "down"),
    Mutant("down_projection", "mask of column 0", "keep_mask(seeds[i], rows, start, K",
           "keep_mask(seeds[i], rows, 0 * start, K", "down"),
    Mutant("down_projection", "not divided by the kept fraction",
           "1.0 / kept_fraction(adapter.dropout) if", "1.0 if", "down"),
    Mutant("down_projection", "in_scale left out", "down * scale[:, None]", "down * 1.0", "down"),
    Mutant("down_projection", "the last share left out", "in range(shares)",
           "in range(shares - 1)", "down"),
    Mutant("down_projection", "1 % in v", "v *= (core * b.scale)", "v *= (core * 1.01 * b.scale)",
           "downs"),
    Mutant("down_projection", "no scale without a core", "v *= b.scale", "v *= 1.0", "downs"),
    Mutant("down_projection", "the first one's phi for all", "ranks, M, PHI[i])",
           "ranks, M, PHI[0])", "downs"),
    Mutant("down_projection", "the first one's seed for all", "keep_mask(seeds[i]",
           "keep_mask(seeds[0]", "downs"),
    Mutant("down_projection", "the first one's sum for all", "kept_x, down, accs[i]",
           "kept_x, down, accs[0]", "downs"),
    Mutant("down_projection", "the last one left out", "for adapter in some]",
           "for adapter in (*some[:-1], some[0])]", "downs"),
    Mutant("up_expansion", "1 % in the bias", "acc += tl.load(bias_ptr",
           "acc += 1.01 * tl.load(bias_ptr", "up"),
    Mutant("up_expansion", "no mask", "tl.where(kept, part, 0.0)", "part", "up"),
    Mutant("up_expansion", "mask of column 0", "keep_mask(seed, rows, first_col",
           "keep_mask(seed, rows, 0 * first_col", "up"),
    Mutant("up_expansion", "the first rank block alone", "range(0, b.R, BLOCK_R)",
           "range(0, min(b.R, BLOCK_R), BLOCK_R)", "up"),
    Mutant("up_expansion", "the first one's seed for all", "tl.load(branches[i].seed)",
           "tl.load(branches[0].seed)", "ups"),
    Mutant("up_expansion", "the last one alone", "acc += tl.where(kept, part, 0.0)",
           "acc = tl.where(kept, part, 0.0)", "ups"),
    Mutant("up_expansion", "the last launch alone", "bias, addend = None, out",
           "bias, addend = None, None", "ups"),
    Mutant("column_walk", "1 % in u", "(BLOCK_M, BLOCK_R), tl.float32)",
           "(BLOCK_M, BLOCK_R), tl.float32) + 0.01", "walk"),
    Mutant("column_walk", "1 % in p", "p += tl.sum(", "p += 1.01 * tl.sum(", "walk"),
    Mutant("column_walk", "shares overlap", "min((share + 1) * m_share, M)",
           "min((share + 2) * m_share, M)", "walk"),
    Mutant("column_walk", "no mask", "tl.where(kept, big, 0.0)", "tl.where(kept, big, big)",
           "walk"),
    Mutant("column_walk", "mask of column 0", "keep_mask(seeds[i], rows, first_col",
           "keep_mask(seeds[i], rows, 0 * first_col", "walk"),
    Mutant("column_walk", "the last share left out", "part.sum(0) for part in",
           "part[: max(1, len(part) - 1)].sum(0) for part in", "walk"),
    Mutant("column_walk", "the last share of c left out", "branch.c.sum(0)",
           "branch.c[: max(1, len(branch.c) - 1)].sum(0)", "walk"),
    Mutant("column_walk", "the first one's seed for all", "keep_mask(seeds[i]",
           "keep_mask(seeds[0]", "walks"),
    Mutant("column_walk", "the first one's sum for all", "kept_big, sums[i]", "kept_big, sums[0]",
           "walks"),
    Mutant("column_walk", "1 % in scaled", "other * scale[None, :]",
           "other * 1.01 * scale[None, :]", "walks"),
    Mutant("column_walk", "half of the other rows", "tl.where(rank_block == 0, M, 0)",
           "tl.where(rank_block == 0, M // 2, 0)", "walks"),
    Mutant("row_norm", "1 % in U", "2.0 * U", "2.02 * U", "norm"),
    Mutant("row_norm", "no limit on K", "in_cols = cols < K", "in_cols = cols < 2 * K", "norm"),
    Mutant("row_norm", "1 % in a gradient", "d_up = scale", "d_up = 1.01 * scale", "norm"),
    Mutant("pieces", "another lane", "(16 * tl.arange(0, 4))", "(16 * (3 - tl.arange(0, 4)))",
           "down"),
    Mutant("pieces", "counter off by one", "(index + 1)", "(index + 2)", "down"),
    Mutant("pieces", "another lane, unaligned", "16 * (index % 4)", "16 * (3 - index % 4)", "down"),
    Mutant("pieces", "threshold off by one", ">= threshold", "> threshold + 300", "down"),
    Mutant("pieces", "cancelling tanh", "tl.abs(t) < 1.0", "tl.abs(t) < 0.0", "phi"),
    Mutant("pieces", "1 % in silu", "1.0 + tl.exp(-t)", "1.01 + tl.exp(-t)", "phi"),
    Mutant("pieces", "1 % in gelu", "t = 0.5 * t", "t = 0.505 * t", "phi"),
    Mutant("pieces", "no low part", "_dot(a_low, b_high, _dot(a_high, b_low, acc))", "acc",
           "split"),
    Mutant("pieces", "no middle part", "_dot(middle, b, _dot(high, b, acc))", "_dot(high, b, acc)",
           "walk"),
    Mutant("decomposed_linear", "1 % in scale", "dropout, core, scale, activation)\n        (",
           "dropout, core, 1.01 * scale, activation)\n        (", "operator"),
    Mutant("decomposed_linear", "no mask in backward", "dy.dtype, seed=seed, dropout=dropout",
           "dy.dtype", "operator"),
    Mutant("decomposed_linear", "dropout forgotten in dA", "[Left(dt, seed, dropout)]",
           "[Left(dt)]", "operator"),
    Mutant("decomposed_linear", "in_scale forgotten in dA", "else walked.c[0] * in_scale",
           "else walked.c[0]", "operator"),
    Mutant("decomposed_linear", "in_scale forgotten in d_x", "d_x, d_in = walked.scaled, walked.p",
           "d_in = walked.p", "operator"),
    Mutant("over_dy", "1 % in u", "u = walked.u * scale", "u = walked.u * (1.01 * scale)",
           "operator"),
    Mutant("over_dy", "no phi'", "dt = dt * activation_derivative",
           "dt = dt + 0.0 * activation_derivative", "operator"),
    Mutant("over_dy", "out_scale left out of dB", "d_up = d_up * out_scale[:, None]",
           "d_up = d_up * 1.0", "operator"),
    Mutant("over_dy", "not divided by the kept fraction", "1.0 / kept_fraction",
           "0.0 + kept_fraction", "operator"),
]  # fmt: skip


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The package's Triton folder is a copy with the bug in it, inside the block."""
    import decomp_kernels.kernels as shared
    import decomp_kernels.kernels.triton as package

    def forget() -> dict[str, object]:
        known = {name: m for name, m in sys.modules.items() if name.startswith(PACKAGE + ".")}
        for name in known:
            del sys.modules[name]
            vars(package).pop(name.rpartition(".")[2], None)
        return known

    (folder,) = package.__path__
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        file, whole = Path(copy) / f"{mutant.file}.py", PACKAGE
        if mutant.old not in file.read_text("utf-8"):  # what every family of kernels has
            file, whole = Path(folder).parent / f"{mutant.file}.py", SHARED
        text = file.read_text("utf-8")
        assert mutant.old in text, f"{mutant.file} has no {mutant.old!r}: renew the mutant"
        text = text.replace(mutant.old, mutant.new)
        before, package.__path__ = forget(), [copy]
        if whole == SHARED:
            name = f"{SHARED}.{mutant.file}"
            before[name] = import_module(name)
            changed = ModuleType(name)
            sys.modules[name] = changed
            setattr(shared, mutant.file, changed)
            exec(compile(text, name, "exec"), vars(changed))
        else:
            file.write_text(text, "utf-8")
        try:
            yield
        finally:
            forget()
            package.__path__ = [folder]
            sys.modules.update(before)
            for name, module in before.items():
                home = package if name.startswith(PACKAGE) else shared
                setattr(home, name.rpartition(".")[2], module)


def run(check: str) -> None:
    """The checks that a mutant of this kind must fail: a few of those that the tests run."""
    for dropping in (False, True):
        for dtype, shape, r in (("fp32", (20, 131), 20), ("bf16-fp32", (70, 132), 70)):
            if check == "down":
                checks.down_projection(dtype, r, shape, True, dropping)
            elif check == "downs":
                checks.down_projections(dtype, r, shape)
            elif check == "walks":
                checks.walk_columns(dtype, 3, (300, 20))  # more rows than a block for each share
                checks.walk_columns(dtype, 20, (7, 20))  # more than one block of ranks
            elif check == "ups":
                checks.up_expansions(dtype, r, shape, count=5)
            elif check == "phi":
                checks.activations()
            elif check == "up":
                checks.up_expansion(dtype, r, shape, not dropping, dropping)
            elif check == "walk":
                checks.column_walk(dtype, r, shape, dropping)
            elif check == "norm":
                checks.row_norm(dtype, r, shape)
            elif check == "split":
                checks.split_products()
            elif check == "operator":
                checks.operator(dtype, dropping)


def survives(mutant: Mutant, run: Callable[[str], None] = run) -> bool:
    with planted(mutant):
        try:
            run(mutant.check)
        except AssertionError:
            return False
    return True


def main() -> int:
    files = sorted(Path(__file__).parent.glob("triton*_mutants.py"))
    survivors = planted_bugs = 0
    for module in (import_module(file.stem) for file in files):
        for check in sorted({mutant.check for mutant in module.MUTANTS}):
            module.run(check)  # passes on the kernels as they are
        for mutant in module.MUTANTS:
            alive = survives(mutant, module.run)
            survivors += alive
            planted_bugs += 1
            word = "SURVIVES" if alive else "found"
            print(f"{word:<9} {mutant.file:<18} {mutant.what}", flush=True)
    print(f"{planted_bugs - survivors} of {planted_bugs} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
