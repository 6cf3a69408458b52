"""Training steps, and getting back into them: an interrupted run ends with the same bits.

Everything that step t depends on is either a function of (options, t), as the rows of its batch
and its learning rate are, or is in the checkpoint: adapters, optimizer state, random generators.
AdamW; the learning rate rises over the first tenth of the steps and then falls to 0, linearly.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels.cli import checkpoint
from decomp_kernels.cli.companions import Companion
from decomp_kernels.cli.errors import BadInput, Interrupted, need, one_line
from decomp_kernels.cli.tasks import Task

LONGEST_GRADIENT = 1.0


class Diverged(BadInput):
    """The loss is infinite or no number."""


@dataclass
class History:
    """What happened so far, one entry a step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def rows_of(step: int, size: int, batch_size: int, seed: int) -> list[int]:
    """The training rows of a step: each epoch takes whole batches of a new random order."""
    batches = size // batch_size
    epoch, batch = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(size, generator=generator)
    return order[batch * batch_size : (batch + 1) * batch_size].tolist()


def rate(step: int, steps: int) -> float:
    """The learning rate of a step over its highest."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def train(
    model: nn.Module,
    task: Task,
    companion: Companion,
    *,
    label: str,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    checkpoint_path: Path | None,
    checkpoint_every: int = 1,
    resume: bool = False,
    shown: bool = True,
) -> History:
    """Train what requires grad, from the checkpoint where there is one and ``resume`` is set.

    checkpoint_path None: nothing is written, and a stopped run is lost.  shown: a progress bar.
    """
    tqdm = need("tqdm", "train").tqdm
    groups = dk.param_groups(model, lr, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups)
    highest = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    history = History()
    if resume and checkpoint_path is not None and checkpoint_path.exists():
        history = _go_on(model, optimizer, companion, checkpoint_path, steps)

    def save() -> None:
        if checkpoint_path is None:
            return
        tensors = checkpoint.training_state(model, optimizer)
        tensors |= {f"companion/{name}": t for name, t in companion.state().items()}
        facts = {"losses": history.losses, "seconds": history.seconds}
        checkpoint.write(checkpoint_path, tensors, facts)

    start = len(history.losses)
    bar = tqdm(
        total=steps, initial=start, desc=label, unit="step", dynamic_ncols=True, disable=not shown
    )  # fmt: skip
    with bar, _signals() as asked:
        for step in range(start, steps):
            began = time.perf_counter()
            for group, most in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = most * rate(step, steps)
            loss = task.loss(model, rows_of(step, task.size, batch_size, seed))
            extra = companion.loss()
            (loss if extra is None else loss + extra).backward()
            nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
            optimizer.step()
            companion.after(step + 1)
            optimizer.zero_grad()
            history.losses.append(loss.item())
            history.seconds.append(time.perf_counter() - began)
            bar.set_postfix_str(
                f"loss {_recent(history.losses):.3f}, {history.seconds[-1]:.2f} s/step"
            )
            bar.update()
            if not math.isfinite(history.losses[-1]):
                raise Diverged(
                    f"{label}: the loss is {history.losses[-1]} at step {step + 1}; lower --lr"
                )
            if asked or (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                save()
            if asked:
                raise Interrupted(
                    f"stopped at step {step + 1} of {steps} of {label}; the same command with "
                    "--resume goes on from there",
                    asked[0],
                )
    return history


def _go_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    companion: Companion,
    path: Path,
    steps: int,
) -> History:
    tensors, facts = checkpoint.read(path)
    try:
        history = History([float(x) for x in facts["losses"]], [float(x) for x in facts["seconds"]])
        if not 0 < len(history.losses) == len(history.seconds) <= steps:
            raise ValueError(f"its steps are not 1 to {steps}")
        checkpoint.restore(model, optimizer, tensors)
        companion.restore(
            {name[10:]: t for name, t in tensors.items() if name.startswith("companion/")}
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise checkpoint.unreadable(path, one_line(error)) from None
    return history


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after its step, with a checkpoint; a second one at once."""
    asked: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for which in (signal.SIGINT, signal.SIGTERM):
        before[which] = signal.signal(which, note)
    try:
        yield asked
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _recent(losses: list[float]) -> float:
    last = losses[-10:]
    return sum(last) / len(last)
