"""One training run of ``bench quality``, the search of a learning rate, and the cost of a step.

    search   each rate of the grid on seed SEARCH_SEED, scored on validation rows
    run      the best of these rates on one of the seeds, scored on test rows
    cost     forward + backward of all arms on one batch, interleaved, and their peak memory

Validation rows are taken from the training rows and never trained on, test rows decide nothing.  A
seed draws the adapter's start, the batches and a head's start: the same batches for every arm.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from decomp_kernels.bench import engine, memory, record
from decomp_kernels.bench.contenders import leave_the_start
from decomp_kernels.bench.observed import OPERATOR, Observed
from decomp_kernels.bench.twins import twin
from decomp_kernels.cli import loop, models
from decomp_kernels.cli.quality_arms import FROZEN, Arm, companion_of
from decomp_kernels.cli.tasks import Task
from decomp_kernels.saved_modules import trained_copies

SEARCH_SEED = 100


@dataclass(frozen=True)
class Setting:
    """What all runs share.  heads: modules that are trained whole, on the frozen model too."""

    base: nn.Module
    test: Task  # its held-out rows are the test rows; the training rows of both are the same
    validation: Task | None
    heads: tuple[str, ...]
    steps: int
    batch_size: int
    mpc_coef: float
    base_dropout: bool
    device: torch.device

    def model(self, arm: Arm | None, seed: int) -> nn.Module:
        """A copy of the base on the same frozen weights, adapted; arm None: with heads alone."""
        torch.manual_seed(seed)
        model = twin(self.base)
        if arm is not None:
            arm.adapt(model, self.steps, self.heads)
            heads: list[nn.Module] = [copy.current() for copy in trained_copies(model).values()]
        else:
            heads = [_own(model, name) for name in self.heads]
        for head in heads:
            _start(head, seed)
        models.training_mode(model, self.base_dropout)
        return model


def score(scores: dict[str, float]) -> float:
    """What a rate is chosen by: the mean of the metrics; no number is the worst."""
    mean = sum(scores.values()) / len(scores)
    return mean if math.isfinite(mean) else -math.inf


def best_rate(rows: Sequence[dict[str, Any]]) -> float:
    """The rate with the best validation score; of equals the smallest."""
    best = max(rows, key=lambda row: (score(row["scores"]), -row["rate"]))
    return best["rate"]


def untrained(setting: Setting) -> dict[str, Any]:
    """The row of the frozen model without any training."""
    model = twin(setting.base).eval()
    return {"kind": "run", "key": FROZEN, "group": FROZEN, "method": FROZEN, "seed": None,
            "rate": None, "trainable": 0, "per_mille": 0.0,
            "scores": _scores(setting.test, model, setting.batch_size)}  # fmt: skip


def train(setting: Setting, arm: Arm | None, kind: str, seed: int, rate: float) -> dict[str, Any]:
    """Train one arm, and its row: kind "search" is scored on validation rows, "run" on test rows.

    arm None: the heads alone, on the frozen model.  A loss that is no number ends the training, and
    the row says so; it is scored as it then is.
    """
    began = time.monotonic()
    task = setting.validation if kind == "search" else setting.test
    assert task is not None
    model = setting.model(arm, seed)
    helper = companion_of(model, arm, setting.mpc_coef, setting.steps)
    diverged, losses = False, []
    try:
        history = loop.train(
            model, task, helper, label=arm.key if arm else FROZEN, steps=setting.steps,
            batch_size=setting.batch_size, lr=rate, weight_decay=0.0, seed=seed,
            checkpoint_path=None, shown=False,
        )  # fmt: skip
        helper.finish()
        losses = [round(loss, 4) for loss in history.losses]
    except loop.Diverged:
        diverged = True
    return {
        "kind": kind, **described(arm), "seed": seed, "rate": rate,
        "scores": _scores(task, model.eval(), setting.batch_size), "losses": losses,
        "diverged": diverged, "seconds": round(time.monotonic() - began, 2),
        "commit": record.commit(),
    }  # fmt: skip


def described(arm: Arm | None) -> dict[str, Any]:
    if arm is None:
        return {"key": FROZEN, "group": FROZEN, "method": FROZEN, "trainable": 0, "per_mille": 0.0}
    found = asdict(arm)
    return {"key": arm.key, "method": found.pop("label")} | found


def cost(
    setting: Setting,
    arms: Sequence[Arm],
    protocol: dict[str, Any],
    clock: engine.Clock,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The row of all arms' steps: the loss with the arm's own term, and backward to the embeddings.

    What is trained is away from its start, since a zero B would spare work.
    """
    began = time.monotonic()
    rows = loop.rows_of(0, setting.test.size, setting.batch_size, protocol["seed"])
    made: list[tuple[str, nn.Module, Arm | None]] = [
        (engine.FROZEN, setting.model(None, 0), None),
        (engine.CONTROL, setting.model(None, 0), None),
        *((arm.key, setting.model(arm, 0), arm) for arm in arms),
    ]
    contenders = []
    for name, model, arm in made:
        leave_the_start(model)
        contenders.append(_contender(name, model, setting, arm, rows))
    told(f"timing {len(contenders)} contenders, {protocol['rounds']} rounds")
    samples = engine.measure(
        contenders, protocol["rounds"], warmup=1, seed=protocol["seed"], clock=clock
    )
    measured = {}
    for contender, (name, model, _) in zip(contenders, made, strict=True):
        with Observed() as observed:
            engine.step(contender)
        ways: Counter[str] = Counter()
        for (operator, _, impl), calls in observed.calls.items():
            ways[impl] += calls * (operator == OPERATOR)
        measured[name] = {
            "path": ", ".join(f"{n} calls of {impl}" for impl, n in sorted(ways.items()) if n)
            or "plain layers",
            "ratio": samples.by_phase(name),
            "ns": samples.ns[name],
            "peak_bytes": memory.peak_bytes(contender, setting.device),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
    told(f"timed in {time.monotonic() - began:.0f} s")
    return {
        "kind": "cost", "rounds": protocol["rounds"], "clock": protocol["clock"],
        "threads": protocol["threads"], "contenders": measured,
        "seconds": round(time.monotonic() - began, 2), "commit": record.commit(),
    }  # fmt: skip


def _scores(task: Task, model: nn.Module, batch_size: int) -> dict[str, float]:
    return {
        name: round(scores.metric, 6) for name, scores in task.evaluate(model, batch_size).items()
    }


def _own(model: nn.Module, name: str) -> nn.Module:
    """The head of ``model`` in tensors of its own, trained."""
    head = model.get_submodule(name)
    for module in head.modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.detach().clone()))
    return head


def _start(head: nn.Module, seed: int) -> None:
    """A new start of a head, the same for every arm of one seed."""
    torch.manual_seed(seed)
    for module in head.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _contender(
    name: str, model: nn.Module, setting: Setting, arm: Arm | None, rows: list[int]
) -> engine.Contender:
    helper = companion_of(model, arm, setting.mpc_coef, setting.steps)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]

    def forward() -> torch.Tensor:
        loss, extra = setting.test.loss(model, rows), helper.loss()
        return loss if extra is None else loss + extra

    def reset() -> None:
        for parameter in trained:
            parameter.grad = None

    return engine.Contender(name, forward, lambda loss: loss.backward(), reset)
