"""The axis ranks of the scale suite: data parallel processes that share the adapter's gradients.

Each process has the same stack and a batch of its own, always of the same size (weak scaling), and
DistributedDataParallel averages the gradients of what is trained: gloo on CPUs, NCCL on GPUs.  All
processes take their steps in one order and start each together, after a barrier that is not timed.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from decomp_kernels.bench import engine, growth
from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT
from decomp_kernels.bench.engine import Contender, Samples
from decomp_kernels.bench.growth import Point

ALONE = "ours, not reduced"  # the same without DistributedDataParallel: what reducing costs


class RanksFailed(RuntimeError):
    """A process failed or did not end in time; the message has each one's last words."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    points: Sequence[Point],
    *,
    rounds: int,
    warmup: int,
    seed: int,
    threads: int,
    device: torch.device,
    clock: engine.Clock | None = None,
    peer: bool = True,
    timeout: float = 600.0,
) -> list[dict[str, Any]]:
    """Measure points of one number of ranks in one start of so many processes: a row for each.

    threads: of each process.  clock: one that can be pickled, the device's wall clock where it is
    None.  timeout: seconds for all of it, after which every process is killed.  A row's "ideal" is
    how much longer than alone so many processes take if they only compute: 1 until their threads
    are more than the cores.  RanksFailed as of ``apart``.
    """
    (world,) = {point.ranks for point in points}
    options = {
        "rounds": rounds, "warmup": warmup, "seed": seed, "threads": threads,
        "device": str(device), "clock": clock, "peer": peer,
    }  # fmt: skip
    by_rank = apart(_measure, world, (list(points), options), timeout)
    ideal = 1.0
    if clock is not time.thread_time_ns and device.type == "cpu":
        ideal = max(1.0, world * threads / cores())
    return [
        _together(found) | {"cores": cores(), "threads": threads, "ideal": ideal}
        for found in zip(*by_rank, strict=True)
    ]


def apart(
    function: Callable[..., Any], world: int, arguments: tuple[Any, ...], timeout: float
) -> list[Any]:
    """What function(rank, world, folder, timeout, *arguments) returns on each rank, as JSON keeps
    it.  folder: theirs alone, for the file by which they meet, and gone afterwards.

    RanksFailed where one of them fails or time is up; none of them is left running.
    """
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="decomp_kernels-ranks-") as folder:
        processes = [
            context.Process(
                target=_on_rank, args=(function, rank, world, folder, timeout, arguments),
                daemon=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            for process in processes:
                process.start()
            waiting = list(processes)
            while waiting and all(process.exitcode in (None, 0) for process in processes):
                left = end - time.monotonic()
                if left <= 0:
                    raise RanksFailed(
                        f"{len(waiting)} of {world} processes had not ended after {timeout:g} s "
                        "and were killed; give them longer with --timeout"
                    )
                sentinels = [process.sentinel for process in waiting]
                multiprocessing.connection.wait(sentinels, timeout=left)
                waiting = [process for process in waiting if process.is_alive()]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RanksFailed(_last_words(Path(folder), codes))
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _on_rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    with open(os.path.join(folder, f"{rank}.log"), "w") as log:  # what libraries say on import
        os.dup2(log.fileno(), 2)
    try:
        found = function(rank, world, folder, timeout, *arguments)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # a group in which one is missing may wait in its own ending


def _last_words(folder: Path, codes: Sequence[int | None]) -> str:
    said = []
    for rank, code in enumerate(codes):
        file = folder / f"{rank}.error"
        if file.exists():
            said.append(f"rank {rank} of {len(codes)}: {file.read_text().strip()}")
        elif code != -9:  # not by our own kill
            log = (folder / f"{rank}.log").read_text() if (folder / f"{rank}.log").exists() else ""
            said.append(f"rank {rank} of {len(codes)}: exit code {code} {log[-2000:]}".strip())
    return "\n".join(said) or f"processes ended with exit codes {list(codes)}"


def _measure(
    rank: int, world: int, folder: str, timeout: float, points: list[Point], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """All points on one rank, one after another."""
    torch.set_num_threads(options["threads"])
    device = torch.device(options["device"])
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=distributed.FileStore(os.path.join(folder, "meeting"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        return [_point(point, rank, device, options) for point in points]
    finally:
        distributed.destroy_process_group()


def _point(
    point: Point, rank: int, device: torch.device, options: dict[str, Any]
) -> dict[str, Any]:
    """A row as this rank sees it; "cpu_ns": CPU time of the whole process, by contender."""
    started = time.monotonic()
    seed, rounds, warmup = options["seed"], options["rounds"], options["warmup"]
    stacks, x, dy = growth.build(
        point, seed=seed, device=device, peer=options["peer"], data_seed=rank
    )
    same, _, _ = growth.build(point, seed=seed, device=device, peer=False, data_seed=rank)
    stacks += [replace(stack, name=ALONE) for stack in same if stack.name == OURS]
    reduced: dict[str, dict[str, Any]] = {}
    made: list[Contender] = []
    spent: dict[str, list[int]] = {}
    for index, stack in enumerate(stacks):
        if stack.name in (OURS, PEFT, FORMULA):
            reduced[stack.name] = _reduced(stack.module, x, dy)
            stacks[index] = stack = replace(stack, module=_parallel(stack.module, device))
        contender = engine.layer(stack.name, stack.module, x, dy)
        spent[stack.name] = []
        made.append(_together_at(contender, spent[stack.name]))
    paths = [growth.path_of(stack, each) for stack, each in zip(stacks, made, strict=True)]
    for times in spent.values():
        times.clear()
    clock = options["clock"] or engine.device_clock(device)
    samples = engine.measure(made, rounds, warmup=warmup, seed=seed, clock=clock)
    cpu_ns = {name: times[warmup:] for name, times in spent.items()}  # before the steps below
    measured = {}
    for stack, contender, path in zip(stacks, made, paths, strict=True):
        by_ddp = reduced.get(stack.name, {})
        buckets = by_ddp.get("buckets", 0)
        measured[stack.name] = {
            "path": path + (f"; DDP, buckets: {buckets}" if by_ddp else ""),
            "ns": samples.ns[stack.name],
            "cpu_ns": cpu_ns[stack.name],
            "reduced_bytes": by_ddp.get("bytes", 0),
            **growth.sizes_of(stack, contender, device),
        }
    return growth.row_of(point, stacks, measured, started)


def _together_at(contender: Contender, spent: list[int]) -> Contender:
    """The same, started by all ranks together; CPU time of each step is appended to ``spent``."""

    def reset() -> None:
        contender.reset()
        distributed.barrier()
        spent.append(-time.process_time_ns())

    def backward(out: Any) -> None:
        contender.backward(out)
        spent[-1] += time.process_time_ns()

    return replace(contender, reset=reset, backward=backward)


def _parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Gradients are reduced; buffers, which never change here, are not sent before each step."""
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def _reduced(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, int]:
    """Bytes that one step hands to the reduction and their buckets, as a hook sees them."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    seen: list[int] = []

    def hook(group, bucket):
        seen.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    counted = _parallel(module, x.device)
    counted.register_comm_hook(distributed.group.WORLD, hook)
    contender = engine.layer("counted", counted, x, dy)
    contender.reset()
    contender.backward(contender.forward())
    contender.reset()
    return {"bytes": sum(seen), "buckets": len(seen)}


def _together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all ranks: a step lasts until the slowest has done, a peak is the largest."""
    row = dict(found[0])
    joined: dict[str, Any] = {}
    ns: dict[str, dict[str, list[int]]] = {}
    for name, first in row["contenders"].items():
        views = [by_rank["contenders"][name] for by_rank in found]
        ns[name] = {
            phase: [
                max(times) for times in zip(*(view["ns"][phase] for view in views), strict=True)
            ]
            for phase in first["ns"]
        }
        joined[name] = first | {
            "ns": ns[name],
            "cpu_ns": [view["cpu_ns"] for view in views],
            "ns_by_rank": [view["ns"]["both"] for view in views],
            "peak_bytes": max(view["peak_bytes"] for view in views),
        }
    samples = Samples(ns)
    for name, contender in joined.items():
        contender["ratio"] = samples.by_phase(name)
    return row | {"contenders": joined}
