"""ratio = t(contender) / t(frozen) by round: interleaved trials, medians and quartiles.

Contenders run one after another in a new random order each round, so a machine that slows down
slows all of them, and a ratio is taken inside its round.  An identical second frozen layer among
them is the control: what its ratio is away from 1 is noise.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FROZEN, CONTROL = "frozen", "control"
PHASES = ("forward", "backward", "both")

Clock = Callable[[], Any]  # two readings' difference is nanoseconds


@dataclass(frozen=True, eq=False)
class Contender:
    """Something with a forward and a backward step; ``reset`` is called before each, untimed."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], None]
    reset: Callable[[], None]
    path: str = ""  # which implementation it takes, for the table


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q1: float
    q3: float


@dataclass
class Samples:
    """Nanoseconds by contender and phase, one a round, in the order of the rounds."""

    ns: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def add(self, other: "Samples", prefix: str) -> None:
        """The other's samples of the same contenders, as phases "<prefix> forward" and so on."""
        for name, phases in other.ns.items():
            for phase, ns in phases.items():
                self.ns[name][f"{prefix} {phase}"] = ns

    def ratios(self, name: str, phase: str = "both", against: str = FROZEN) -> list[float]:
        """The contender's time over that of ``against``, each pair from one round."""
        pairs = zip(self.ns[name][phase], self.ns[against][phase], strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def ratio(self, name: str, phase: str = "both", against: str = FROZEN) -> Spread:
        return spread(self.ratios(name, phase, against))

    def by_phase(self, name: str, against: str = FROZEN) -> dict[str, dict[str, float]]:
        """The ratio of every phase, as results files have it."""
        return {
            phase: self.ratio(name, phase, against)._asdict() for phase in sorted(self.ns[name])
        }

    def time(self, name: str, phase: str = "both") -> Spread:
        return spread(self.ns[name][phase])


def spread(values: Sequence[float]) -> Spread:
    """Quartiles by linear interpolation; of a single value, that value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    warmup: int = 3,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    split: bool = True,
    before: Callable[[Contender], None] | None = None,
) -> Samples:
    """Time forward + backward of each contender once a round.

    ``split`` reads the clock between the two as well.  ``before`` is called with the contender
    before each of its timed steps, untimed (bench/conditions.py: what is in the caches then).
    Raises ValueError where there are no rounds or two contenders of one name.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders must have different names, got {names}")
    phases = PHASES if split else ("both",)
    samples = Samples({name: {phase: [] for phase in phases} for name in names})
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    for _ in range(warmup):
        for contender in order:
            _readings(contender, clock, split, before)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whichever contender runs then
    try:
        for _ in range(rounds):
            shuffle(order)
            read = [_readings(contender, clock, split, before) for contender in order]
            # Subtracted after the round: a device's difference waits until its queue is empty.
            for contender, (start, middle, end) in zip(order, read, strict=True):
                ns = samples.ns[contender.name]
                ns["both"].append(end - start)
                if split:
                    ns["forward"].append(middle - start)
                    ns["backward"].append(end - middle)
    finally:
        if collecting:
            gc.enable()
    return samples


def layer(name: str, module: nn.Module, x: Tensor, dy: Tensor, path: str = "") -> Contender:
    """A module on x [..., K] with the output gradient dy [..., N].

    x is copied to a leaf of its own that requires grad, so the gradient of x is part of the step.
    """
    leaf = x.detach().clone().requires_grad_()
    trained = [p for p in module.parameters() if p.requires_grad]

    def reset() -> None:
        leaf.grad = None
        for parameter in trained:
            parameter.grad = None

    return Contender(
        name,
        forward=lambda: module(leaf),
        backward=lambda y: y.backward(dy),
        reset=reset,
        path=path,
    )


def call(name: str, function: Callable[[], Any]) -> Contender:
    """A plain call, with nothing to differentiate: its time is its forward's."""
    return Contender(name, function, lambda _: None, lambda: None)


class _Mark:
    """A place in a device's queue; the difference of two waits for the later one."""

    def __init__(self, event: Any) -> None:
        self.event = event
        event.record()

    def __sub__(self, earlier: "_Mark") -> int:
        self.event.synchronize()
        return round(earlier.event.elapsed_time(self.event) * 1e6)


def device_clock(device: torch.device) -> Clock:
    """The device's own time: where its queue has come to, without waiting in between."""
    if device.type == "cpu":
        return time.perf_counter_ns
    event = torch.get_device_module(device).Event
    return lambda: _Mark(event(enable_timing=True))


def step(contender: Contender) -> None:
    """One step, untimed."""
    contender.reset()
    contender.backward(contender.forward())


def _readings(
    contender: Contender, clock: Clock, split: bool, before: Callable[[Contender], None] | None
) -> tuple[Any, Any, Any]:
    """The clock before the step, between forward and backward, and after it."""
    if before is not None:
        before(contender)
    contender.reset()
    start = clock()
    out = contender.forward()
    middle = clock() if split else start
    contender.backward(out)
    return start, middle, clock()
