"""What only a GPU can show, in stages: make gpu-check.

    kernels    the Triton tests on the device, and CUDA graphs; compute-sanitizer's memcheck and
               racecheck
    extension  the native library: its tests on the device, the sanitizer, its GEMM beside cuBLAS
    tune       tiles and implementations, into tables beside the results
    bench      the suites of decomp-kernels bench layer and bench model, into layer.json and
               model.json: our implementations beside the frozen linear, PEFT, and axolotl's
               and unsloth's functions where they can be imported; warm and cold caches, eager
               and, under 100 microseconds, replayed from a CUDA graph

Each stage writes its own JSON under benchmarks/results/<gpu>/ as it goes, and leaves out what is
there already: a run that was cut off goes on where it stopped (--again starts over).  Plain, all
stages run in a reduced form, in under ten minutes; --full runs the whole of those that --stage
names.  --dry does every step but the device's, on a CPU, and writes into a folder of its own.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_extension import extension
from gpu_rows import PYTEST, ROOT, SERIAL, Rows, run

from decomp_kernels import dispatch
from decomp_kernels.bench import decoder, layers, record, tune

TESTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("test_triton*.py", "test_cuda_graphs.py")
    for path in (ROOT / "tests").glob(pattern)
)
SANITIZED = "tests/test_triton_kernels.py::test_a_rank_above_every_block"
MINUTES = {"kernels": 8.0, "extension": 8.0, "tune": 8.0, "bench": 8.0}
REDUCED_MINUTES = {"kernels": 3.0, "extension": 2.0, "tune": 1.5, "bench": 2.5}

BENCH_TOKENS, BENCH_RANKS = (1, 16, 512, 2048, 8192), (16, 64, 384)
BENCH_METHODS = ("lora", "dora", "ssb")
FILES = {"bench": ("layer.json", "model.json")}  # stages that do not write <stage>.json alone


def main() -> int:
    args = _arguments()
    device = torch.device("cpu" if args.dry else "cuda")
    name = "dry" if args.dry else _slug(dispatch.device_name(device))
    folder = args.output or ROOT / ("runs/gpu-check" if args.dry else "benchmarks/results") / name
    try:
        record.check_place(folder / "kernels.json")
    except OSError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    failed = []
    for stage in args.stage or STAGES:
        path = folder / FILES.get(stage, (f"{stage}.json",))[0]
        for file in FILES.get(stage, (path.name,)) if args.again else ():
            path.with_name(file).unlink(missing_ok=True)
        minutes = (MINUTES if args.full else REDUCED_MINUTES)[stage]
        print(f"== {stage} (at most {minutes:g} minutes, into {path})", flush=True)
        started = time.monotonic()
        ok = STAGES[stage](args, device, path, started + 60 * minutes)
        print(f"== {stage}: {'done' if ok else 'FAILED'} in {time.monotonic() - started:.0f} s\n")
        failed += [] if ok else [stage]
    print(f"gpu-check: {', '.join(failed) + ' failed' if failed else 'all stages done'}")
    return 1 if failed else 0


def kernels(args: argparse.Namespace, device: torch.device, path: Path, until: float) -> bool:
    """Test files, each in a process that a crash of the device ends alone; the sanitizer."""
    rows = Rows(path, "gpu-check kernels", args)
    jobs = {str(test): [*PYTEST, str(test)] for test in TESTS}
    if args.full:
        jobs |= {f"{test} (full)": [*PYTEST, "-m", "full", str(test)] for test in TESTS}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            jobs[f"compute-sanitizer {tool}"] = [*words, *SERIAL, SANITIZED]
        else:
            print(f"compute-sanitizer is not installed: no {tool}")
    if args.dry:  # collected, imported and parametrized, and not run
        jobs = {name: [*command, "--collect-only"] for name, command in jobs.items()}
    for name, command in jobs.items():
        if rows.has(name):
            continue
        left = until - time.monotonic()
        if left < 5:
            print(f"{name}: no time left; run again to go on")
            continue
        code, out = run(command, left)
        counts = {
            word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", out)
        }
        rows.add({"name": name, "code": code, "counts": counts, "output": out[-6000:]})
        print(f"{name}: {'ok' if code == 0 else f'exit {code}'} {counts}", flush=True)
        if code:
            print(out[-1500:])
    return all(row["code"] == 0 for row in rows.all) and len(rows.all) >= len(jobs)


def tuned(args: argparse.Namespace, device: torch.device, path: Path, until: float) -> bool:
    """``decomp-kernels tune`` into ``tables`` beside the results."""
    minutes = max(0.2, (until - time.monotonic()) / 60 / 2 - 0.2)
    words = ["tune", "--output", str(path), "--tables", str(path.parent / "tables")]
    words += ["--minutes", f"{minutes:.2f}"] + ([] if args.full else ["--quick", "--rounds", "9"])
    words += ["--dry", "--rounds", "1", "--minutes", "0.1"] if args.dry else []
    if path.exists():
        print("tuned before; --again measures anew")
        return True
    code, out = run(
        [sys.executable, "-m", "decomp_kernels.cli.main", *words], until - time.monotonic()
    )
    print(out[-3000:])
    return code == 0


def bench(args: argparse.Namespace, device: torch.device, path: Path, until: float) -> bool:
    """The layer suite and the model suite, each into its file: the whole of one, then the other."""
    rounds = {"rounds": 1, "warmup": 1} if args.dry else {"rounds": 15, "warmup": 4}
    given: dict[str, Any] = {**rounds, "seed": 0, "device": device}
    impls = tuple(impl for impl in dispatch.CANDIDATES if not args.dry or impl == tune.LIBRARY)

    def layer(row: layers.Row) -> dict[str, Any]:
        return layers.run(row, **given, impls=impls, compile_too=args.full, cold=args.dry)

    layer_rows = [
        (f"{row.label} r={dict(row.options).get('r', 0)} {row.shape} {row.adapter_dtype}",
         partial(layer, row))
        for row in _layer_rows(args)
    ]  # fmt: skip
    model_rows = [
        (f"{row.label} {row.size} checkpointing {row.checkpointing}", partial(
            decoder.run, row, **given, backend="inductor" if args.full else None))
        for row in _model_rows(args)
    ]  # fmt: skip
    now = time.monotonic()
    shares = {"layer": (layer_rows, now + (until - now) * 2 / 3), "model": (model_rows, until)}
    done = [
        _suite(Rows(path.with_name(f"{suite}.json"), suite, args), todo, end)
        for suite, (todo, end) in shares.items()
    ]
    return all(done)


def _suite(rows: Rows, todo: list[tuple[str, Callable[[], dict[str, Any]]]], until: float) -> bool:
    for name, measure in todo:
        if rows.has(name):
            continue
        if time.monotonic() >= until:
            print(f"{name}: no time left; run again to go on")
            continue
        try:
            found = measure()
        except Exception as error:  # one row that fails must not lose the others
            rows.add({"name": name, "error": f"{type(error).__name__}: {str(error)[:500]}"})
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        rows.add({"name": name} | found)
        ratios = {n: c["ratio"]["both"]["median"] for n, c in found["contenders"].items()}
        print(
            f"{name}: " + "  ".join(f"{n} {ratio:.3f}" for n, ratio in ratios.items()), flush=True
        )
    return all("error" not in row for row in rows.all) and bool(rows.all)


def _model_rows(args: argparse.Namespace) -> list[decoder.Row]:
    if args.dry:
        size = decoder.Size(16, 1, 2, 1, 32, 32, batch=1, sequence=8)
    else:  # the blocks of Llama 3 8B, few of them, and a vocabulary that does not hide them
        size = decoder.Size(4096, 8 if args.full else 2, 32, 8, 14336, 32768, 1, 2048)
    kinds = decoder.CHECKPOINTING if args.full or args.dry else ("none",)
    return list(
        decoder.rows(
            BENCH_METHODS, size, ["bfloat16"], rank=4 if args.dry else 16, checkpointing=kinds
        )
    )


def _layer_rows(args: argparse.Namespace) -> list[layers.Row]:
    if args.dry:
        grid = [((3, 24, 20), 4)]
    elif args.full:
        grid = [((M, K, N), r) for M in reversed(BENCH_TOKENS) for N, K in tune.LAYERS
                for r in BENCH_RANKS]  # fmt: skip
    else:
        N, K = tune.LAYERS[0]
        grid = [((M, K, N), 16) for M in (8192, 2048, 16)]
    made = []
    for shape, r in grid:
        for method in BENCH_METHODS:
            if method == "ssb" and r != grid[0][1]:
                continue  # it has no rank: once a shape
            wide = layers.ADAPTER_DTYPES if method == "lora" else (layers.AS_BASE,)
            made += layers.rows(
                [method], [shape], ["bfloat16"], r, dropouts=(0.0, 0.05), adapter_dtypes=wide
            )
    return made


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, action="append", help="default: all")
    parser.add_argument("--full", action="store_true", help="the whole grids, 8 minutes a stage")
    parser.add_argument("--dry", action="store_true", help="every step but the device's, on a CPU")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("gpu-check needs a GPU that PyTorch sees; --dry does every step but its work")
    return args


STAGES: dict[str, Callable[[argparse.Namespace, torch.device, Path, float], bool]] = {
    "kernels": kernels,
    "extension": extension,
    "tune": tuned,
    "bench": bench,
}

if __name__ == "__main__":
    sys.exit(main())
