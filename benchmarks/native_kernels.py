"""Host kernels next to the library calls they stand in for, interleaved by the engine.

    python benchmarks/native_kernels.py --threads 2 --output native-kernels.json
    python benchmarks/native_kernels.py --only dropout --rounds 50 --level avx2

A row is the library's time over the kernel's, round by round: median and quartiles; above 1 the
kernel is faster.  One thread is timed by the process's CPU time, which other processes disturb
least; several by the clock on the wall.
"""

import argparse
import time
from itertools import chain
from pathlib import Path

import native_norm
import native_walk
import torch

from decomp_kernels import native_library
from decomp_kernels.bench import engine, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--level", help="the instruction set")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if args.output is not None:
        record.check_place(args.output)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.level:
        native_library.set_cpu_level(args.level)
    clock = time.process_time_ns if args.threads == 1 else time.perf_counter_ns
    rows = []
    print(f"{args.threads} thread(s), {native_library.cpu_level()}, torch {torch.__version__}")
    print(f"{'kernel':26}{'shape':36}{'aten ms':>9}{'native':>9}{'ratio':>7}")
    for kernel, shape, aten, native in chain(native_walk.cases(), native_norm.cases()):
        if args.only not in kernel:
            continue
        samples = engine.measure(
            [engine.call("aten", aten), engine.call("native", native)],
            args.rounds, warmup=2, clock=clock, split=False,
        )  # fmt: skip
        ratio = samples.ratio("aten", against="native")
        ms = {name: samples.time(name).median / 1e6 for name in ("aten", "native")}
        rows.append({"kernel": kernel, "shape": shape, "ratio": ratio._asdict(), "ms": ms})
        print(
            f"{kernel:26}{shape:36}{ms['aten']:9.3f}{ms['native']:9.3f}{ratio.median:7.2f}"
            f"  ({ratio.q1:.2f} to {ratio.q3:.2f})",
            flush=True,
        )
    if args.output is not None:
        protocol = {"threads": args.threads, "rounds": args.rounds,
                    "level": native_library.cpu_level()}  # fmt: skip
        record.write(args.output, record.document("native kernels", protocol, rows))


if __name__ == "__main__":
    main()
