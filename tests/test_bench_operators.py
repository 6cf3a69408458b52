"""pytest benchmarks: it runs, and every operator is in it, forward and backward ones."""

import re
import subprocess
import sys
from pathlib import Path

from decomp_kernels.bench import operators


def test_every_operator_has_a_micro_benchmark_that_runs():
    root = Path(__file__).parents[1]
    words = ["-m", "pytest", "benchmarks", "-v", "--benchmark-disable", "--threads=1"]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"bench_operator\[\w+-(\w+)-(\w+)\] PASSED", done.stdout)
    assert set(ran) == {
        (kind, name) for kind in ("fp32", "bf16") for name in operators.registered()
    }
