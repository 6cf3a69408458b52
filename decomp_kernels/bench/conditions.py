"""What a step is timed under: plain on a CPU; on a GPU warm and cold caches, eager and replayed.

    forward, backward, both     CPU: after whatever ran before; GPU: warm, after an untimed step
                                of the same contender
    cold forward, ...           after a buffer larger than the caches was written (CPU: if asked)
    replay both                 GPU, steps under 100 microseconds: the step as a CUDA graph, warm
    cold replay both            the same after the flush

Every condition is an interleaved run of its own, with the frozen contender and the control in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.bench import engine
from decomp_kernels.bench.engine import FROZEN, Clock, Contender, Samples
from decomp_kernels.bench.graphs import replayed

SHORT_NS = 100_000  # steps that the host may be slower to launch than the device to run
GPU_FLUSH = 256 * 2**20  # bytes; the largest L2 is a quarter of that
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CPU_LAST_LEVEL = 32 * 2**20  # where the system does not tell

Flush = Callable[[], None]


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    device: torch.device,
    clock: Clock | None = None,
    warmup: int = 3,
    seed: int = 0,
    cold: bool = False,
    flush: Flush | None = None,
    cuda: Any = torch.cuda,
) -> tuple[Samples, dict[str, str]]:
    """(the samples of every condition, why a contender has none of its replay).

    clock: the device's own where it is None.  cold: on a CPU, cold caches too.  ``flush`` and
    ``cuda`` stand in for the device's in tests.
    """
    clock = engine.device_clock(device) if clock is None else clock
    on_gpu = device.type != "cpu"

    def run(
        given: Sequence[Contender], before: Callable[[Contender], None] | None, split: bool = True
    ) -> Samples:
        return engine.measure(
            given, rounds, warmup=warmup, seed=seed, clock=clock, split=split, before=before
        )

    warm = engine.step if on_gpu else None
    samples = run(contenders, warm)
    if not on_gpu and not cold:
        return samples, {}
    flush = flusher(device) if flush is None else flush

    def flushed(_: Contender) -> None:
        flush()

    samples.add(run(contenders, flushed), "cold")
    if device.type != "cuda":
        return samples, {}
    graphs, failed = _graphs(contenders, clock, cuda)
    if graphs:
        samples.add(run(graphs, warm, split=False), "replay")
        samples.add(run(graphs, flushed, split=False), "cold replay")
    return samples, failed


def flusher(device: torch.device) -> Flush:
    """Writes a buffer of four times the last cache, on a GPU of at least 256 MiB."""
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(GPU_FLUSH, 4 * known)
    elif device.type == "cpu":
        size = 4 * last_level_cache()
    else:
        size = GPU_FLUSH
    buffer = torch.ones(size // 4, dtype=torch.int32, device=device)

    def flush() -> None:
        buffer.add_(1)  # read and written, so no store goes past the caches

    return flush


def last_level_cache(folder: Path = CPU_CACHES) -> int:
    """Bytes of the largest cache of the first core, as Linux tells them; a guess elsewhere."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [file.read_text().strip() for file in folder.glob("index*/size")]
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units]
    return max(found, default=CPU_LAST_LEVEL)


def _graphs(
    contenders: Sequence[Contender], clock: Clock, cuda: Any
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders recorded, where the frozen one's replay is short; why one was not."""
    frozen = next((c for c in contenders if c.name == FROZEN), contenders[0])
    made: list[Contender] = []
    failed: dict[str, str] = {}
    for contender in (frozen, *(c for c in contenders if c is not frozen)):
        try:
            made.append(replayed(contender, cuda))
        except Exception as error:  # one that cannot be recorded must not lose the others
            failed[contender.name] = f"{type(error).__name__}: {str(error)[:300]}"
        if contender is frozen and not _short(made, clock):
            return [], failed
    return made, failed


def _short(made: list[Contender], clock: Clock) -> bool:
    if not made:
        return False  # without the frozen one there is nothing to compare with
    (frozen,) = made
    times = engine.measure(made, 5, clock=clock, split=False)
    return times.time(frozen.name).median < SHORT_NS
