"""Which tile is fastest for a Triton kernel, by changing one size at a time from the present one.

Each step tries every neighbour of the best tile so far (a block doubled or halved, other warps,
other stages), interleaved with the table's own tile, and moves to the fastest; it stops where none
is faster by MARGIN.  A tile that does not compile, does not fit or gives another result is dropped.
"""

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from decomp_kernels import dispatch, tables
from decomp_kernels.bench import engine
from decomp_kernels.bench.engine import Contender
from decomp_kernels.bench.tune import Cell

MARGIN = 0.02
SMALLEST, LARGEST = 16, 256
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
NOW = "the table's"
ON_WEIGHTS = ("row_norm",)  # M is the rows of W, whatever the tokens

Case = Callable[[Cell, torch.device], Callable[[], Any]]


def kernels() -> dict[str, Case]:
    """A call of each tuned kernel at a cell; the kernels are imported by the call."""
    return {
        "down_projection": _down_projection,
        "up_expansion": _up_expansion,
        "column_walk": _column_walk,
        "row_norm": _row_norm,
        "fused_forward": _fused_forward,
        "fused_input_gradient": _fused_input_gradient,
    }


def tune(
    kernel: str, cell: Cell, device: torch.device, *, rounds: int, until: float
) -> dict[str, Any]:
    """The best tile found for ``kernel`` at ``cell`` before ``until`` (time.monotonic()).

    Returns {"kernel", "cell", "config", "gain", "tried", "failed"}; gain is the table's time over
    the best one's, 1.0 where the table's own is kept.
    """
    run = kernels()[kernel](cell, device)
    sizes = {"M": cell.N if kernel in ON_WEIGHTS else cell.M, "r": cell.r}
    kinds = {"adapter": _adapter(cell), "base": _base(cell)}
    entry = tables.first(kernel, dispatch.architecture(device), sizes, **kinds)  # type: ignore[arg-type]
    present = entry["config"]
    expected = _flat(run())
    best, gain, tried, failed = present, 1.0, 1, 0
    while time.monotonic() < until:
        found = {}
        for config in neighbours(best):
            if time.monotonic() >= until:
                break
            tried += 1
            try:
                with tables.trial(kernel, config):
                    if _same(_flat(run()), expected):
                        found[str(sorted(config.items()))] = config
            except Exception:  # the compiler's and the device's refusals are all answers here
                failed += 1
        if not found:
            break
        contenders = [_contender(name, run, kernel, config, device)
                      for name, config in {NOW: best, **found}.items()]  # fmt: skip
        samples = engine.measure(
            contenders, rounds, warmup=2, clock=engine.device_clock(device), split=False
        )
        times = {name: samples.ratio(name, against=NOW).median for name in found}
        winner = min(times, key=times.__getitem__)
        if times[winner] > 1.0 - MARGIN:
            break
        best, gain = found[winner], gain / times[winner]
    return {
        "kernel": kernel, "cell": cell.label, **sizes, **kinds,
        "config": best, "gain": round(gain, 3), "tried": tried, "failed": failed,
    }  # fmt: skip


def neighbours(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tiles that differ from ``config`` in one size by one step."""
    for name, value in config.items():
        if name.startswith("BLOCK_"):
            steps = [size for size in (value // 2, value * 2) if SMALLEST <= size <= LARGEST]
        elif name == "SHARES":
            steps = [size for size in (value // 2, value * 2) if 1 <= size <= 64]
        elif name in ("num_warps", "num_stages"):
            known = WARPS if name == "num_warps" else STAGES
            steps = [size for size in known if size != value and size in (
                value // 2, value * 2, value - 1, value + 1)]  # fmt: skip
        else:
            continue
        for step in steps:
            yield {**config, name: step}


def entry(found: dict[str, Any], arch: str, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The table entry of a tile that ``tune`` found."""
    return {
        "arch": arch,
        "when": {"M_max": found["M"], "r_max": found["r"], "scaled_max": 0, "dropout_max": 0},
        "adapter": found["adapter"], "base": found["base"], "config": found["config"],
        "measured": measured | {"gain": found["gain"]} if measured else False,
    }  # fmt: skip


def _adapter(cell: Cell) -> str:
    return tables.width(cell.wide_adapter or cell.dtype == "float32")


def _base(cell: Cell) -> str:
    return tables.width(cell.dtype == "float32")


def _contender(
    name: str, run: Callable[[], Any], kernel: str, config: dict[str, Any], device: torch.device
) -> Contender:
    def forward() -> None:
        with tables.trial(kernel, config):
            run()

    return engine.call(name, forward)


def _flat(results: Any) -> list[Tensor]:
    found = results if isinstance(results, tuple | list) else [results]
    return [t for t in found if isinstance(t, Tensor)]


def _same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two tiles' results are one but for the order of their sums."""
    for ours, theirs in zip(actual, expected, strict=True):
        distance = torch.linalg.vector_norm(ours.double() - theirs.double())
        if not distance <= 1e-2 * torch.linalg.vector_norm(theirs.double()):
            return False
    return True


def _module(name: str) -> Any:
    return import_module(f"decomp_kernels.kernels.triton.{name}")


def _operands(cell: Cell, device: torch.device) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in cell.tensors(device).items()}


def _rows(cell: Cell, width: int, like: Tensor) -> Tensor:
    return torch.randn(cell.M, width, device=like.device).to(like.dtype)


def _down_projection(cell: Cell, device: torch.device) -> Callable[[], Any]:
    o, project = _operands(cell, device), _module("down_projection").down_projection
    return lambda: project(o["x"], o["down"])


def _up_expansion(cell: Cell, device: torch.device) -> Callable[[], Any]:
    o, expand = _operands(cell, device), _module("up_expansion").up_expansion
    v = _rows(cell, cell.r, o["up"])
    return lambda: expand(v, o["up"].T, o["x"].dtype)


def _column_walk(cell: Cell, device: torch.device) -> Callable[[], Any]:
    """Over dy for dH and dB, and over x for dA."""
    o, walk = _operands(cell, device), _module("column_walk").column_walk
    dy, v = _rows(cell, cell.N, o["x"]), _rows(cell, cell.r, o["up"])
    return lambda: (*walk(dy, right=o["up"], left=v), *walk(o["x"], left=v))


def _row_norm(cell: Cell, device: torch.device) -> Callable[[], Any]:
    o, forward = _operands(cell, device), _module("row_norm").forward
    squared = o["weight"].float().square().sum(1)
    return lambda: forward(o["weight"], squared, o["down"], o["up"], 1.0)


def _fused_forward(cell: Cell, device: torch.device) -> Callable[[], Any]:
    o, forward = _operands(cell, device), _module("fused_forward").fused_forward
    v = _rows(cell, cell.r, o["up"])
    return lambda: forward(o["x"], o["weight"], v=v, up=o["up"])


def _fused_input_gradient(cell: Cell, device: torch.device) -> Callable[[], Any]:
    o, backward = _operands(cell, device), _module("fused_input_gradient").fused_input_gradient
    dy, dt = _rows(cell, cell.N, o["x"]), _rows(cell, cell.r, o["down"])
    return lambda: backward(dy, o["weight"], dt=dt, down=o["down"])
