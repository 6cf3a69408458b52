"""time and peak memory of one forward + backward: frozen model, our methods, and their peers.

Where the peer is PEFT's model, another one is run with ``accelerate``: the same Parameters and the
same classes to its user, on our operator.

Every contender is a copy of the model on the same base weights, takes the same batch, and carries
the gradient down to the embeddings, so that the frozen model has a backward to compare with.  A
second frozen model is the control: what its ratio is away from 1 is noise.  The optimizer is not
in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decomp_kernels.bench import engine, memory
from decomp_kernels.bench.train_tables import ACCELERATED
from decomp_kernels.bench.twins import PEFT, method_of, peer_of, twin
from decomp_kernels.cli.errors import need, one_line
from decomp_kernels.cli.models import training_mode
from decomp_kernels.cli.tasks import Task
from decomp_kernels.interop.peft.accelerate import accelerate, fused_calls
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import Method


@dataclass
class Compared:
    """One contender.  seconds and ratios are (median, first quartile, third quartile)."""

    label: str  # of the method; "frozen" and "control" have no method
    kind: str  # "frozen", "ours", PEFT, ACCELERATED or "authors' formula"
    trainable: int
    seconds: engine.Spread
    over_frozen: engine.Spread
    over_ours: engine.Spread | None  # a peer's time over ours
    peak_bytes: int
    over_peft: engine.Spread | None = None  # of ACCELERATED: its time over PEFT's own
    fused: tuple[int, int] | None = None  # of ACCELERATED: (calls of layers on the operator, all)


def peer(model: nn.Module, method: Method, adapted: list[str]) -> tuple[nn.Module, str] | None:
    """``peer_of``; what PEFT refuses is said, and left out."""
    try:
        return peer_of(model, method, adapted)
    except ValueError as error:  # options or shapes that it does not take
        print(f"note: PEFT has no {method.name} with these options here: {one_line(error)}")
        return None


def compare(
    base: nn.Module,
    adapted: dict[str, nn.Module],
    task: Task,
    rows: list[int],
    *,
    rounds: int,
    seed: int,
    base_dropout: bool,
    device: torch.device,
) -> list[Compared]:
    """Interleaved rounds over the frozen model, ``adapted`` by label, and the peers of each."""
    models: dict[str, tuple[str, str, nn.Module]] = {
        engine.FROZEN: (engine.FROZEN, "frozen", twin(base)),
        engine.CONTROL: (engine.CONTROL, "frozen", twin(base)),
    }
    for label, model in adapted.items():
        models[label] = (label, "ours", model)
        names = list(adapted_layers(model))
        found = peer(base, method_of(model), names)
        if found is not None:
            models[f"{label}, {found[1]}"] = (label, found[1], found[0])
        if found is not None and found[1] == PEFT:
            another: Any = peer(base, method_of(model), names)
            models[f"{label}, {ACCELERATED}"] = (label, ACCELERATED, accelerate(another[0]))
    tqdm = need("tqdm", "train").tqdm
    with tqdm(total=(rounds + 1) * len(models), desc="timing", unit="step") as bar:
        contenders = [
            _contender(name, model, task, rows, base_dropout, bar)
            for name, (_, _, model) in models.items()
        ]
        samples = engine.measure(
            contenders, rounds, warmup=1, seed=seed, clock=engine.device_clock(device), split=False
        )
    results = []
    for contender in contenders:
        name = contender.name
        label, kind, model = models[name]
        time = samples.time(name)
        ours = samples.ratio(name, against=label) if kind not in ("ours", "frozen") else None
        result = Compared(
            label, kind, sum(p.numel() for p in model.parameters() if p.requires_grad),
            engine.Spread(*(ns / 1e9 for ns in time)), samples.ratio(name), ours,
            memory.peak_bytes(contender, device),
        )  # fmt: skip
        if kind == ACCELERATED:
            result.over_peft = samples.ratio(name, against=f"{label}, {PEFT}")
            result.fused = fused_calls(model)
        results.append(result)
    return results


def _contender(
    name: str, model: nn.Module, task: Task, rows: list[int], base_dropout: bool, bar: Any
) -> engine.Contender:
    training_mode(model, base_dropout)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, given, output: output.requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]

    def reset() -> None:
        bar.update()
        for parameter in trained:
            parameter.grad = None

    return engine.Contender(
        name,
        forward=lambda: task.loss(model, rows),
        backward=lambda loss: loss.backward(),
        reset=reset,
    )
