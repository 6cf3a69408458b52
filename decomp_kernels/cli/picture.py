"""The job as a picture: the loss of each method by step, and what each gained on held-out rows."""

import io
from typing import TYPE_CHECKING, Any

from decomp_kernels.cli.errors import need
from decomp_kernels.cli.tasks import Task

if TYPE_CHECKING:
    from decomp_kernels.cli.report import Trained

# Okabe and Ito's colours: told apart by everyone, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTH = 10  # steps


def draw(headline: str, task: Task, frozen: dict[str, float], trained: "list[Trained]") -> bytes:
    """A PNG file."""
    need("matplotlib", "train").use("Agg")
    from matplotlib import pyplot as plt

    height = max(4.6, 1.2 + 0.42 * len(trained) * len(task.metrics))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(headline, fontsize=10)
    _losses(left, trained)
    _gains(right, task, frozen, trained)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144)
    plt.close(figure)
    return file.getvalue()


def _losses(axes: Any, trained: "list[Trained]") -> None:
    for number, result in enumerate(trained):
        colour = COLOURS[number % len(COLOURS)]
        losses = result.history.losses
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        around = [losses[max(0, step - SMOOTH // 2 - 1) : step + SMOOTH // 2] for step in steps]
        means = [sum(window) / len(window) for window in around]
        axes.plot(
            steps, means, color=colour, linewidth=2, label=f"{result.label}, lr {result.lr:g}",
            linestyle=("solid", "dashed", "dotted", "dashdot")[number // len(COLOURS) % 4],
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel(f"training loss (bold: mean over {SMOOTH + 1} steps)")
    axes.set_title("Loss", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(
        frameon=False, ncols=1 + len(trained) // 12, fontsize=10 if len(trained) < 12 else 7
    )


def _gains(axes: Any, task: Task, frozen: dict[str, float], trained: "list[Trained]") -> None:
    """A dot and its 95 % interval for each method and metric, from the frozen model's 0."""
    ticks: list[float] = []
    labels, place = [], 0.0
    for name in task.metrics:
        for number, result in enumerate(trained):
            gain, low, high = result.gains[name]
            axes.errorbar(
                gain, place, xerr=[[gain - low], [high - gain]], fmt="o", capsize=4,
                color=COLOURS[number % len(COLOURS)],
            )  # fmt: skip
            axes.annotate(
                f"{frozen[name]:.3f} → {result.after[name]:.3f}", (gain, place),
                xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
            ticks.append(place)
            labels.append(f"{result.label}  {name}")
            place -= 1
        place -= 0.6
    axes.set_yticks(ticks, labels)
    axes.axvline(0, color="#777777", linewidth=1)
    axes.margins(x=0.15)
    axes.set_ylim(min(ticks) - 0.6, 0.9)
    axes.set_xlabel("gain over the frozen model, 95 % interval")
    axes.set_title("Held-out rows", loc="left")
    axes.grid(axis="x", alpha=0.25)
