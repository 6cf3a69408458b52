"""A contender's step recorded in a CUDA graph: what the device does, without what the host adds.

Below about 100 microseconds an eager step is as long as the host takes to launch it; its replay is
as long as the device takes.  Both are shown.
"""

from typing import Any

import torch

from decomp_kernels.bench.engine import Contender, step

WARM_UP = 3  # as torch.cuda.make_graphed_callables does: libraries choose kernels and workspaces


def replayed(contender: Contender, cuda: Any = torch.cuda) -> Contender:
    """The contender whose forward replays its whole step, recorded here; its backward does nothing.

    Raises what PyTorch raises where the step cannot be recorded: one that waits for the device.
    The gradients are made in the graph's memory, so there is nothing to reset.
    """
    home, aside = cuda.current_stream(), cuda.Stream()
    aside.wait_stream(home)
    with cuda.stream(aside):
        for _ in range(WARM_UP):
            step(contender)
    home.wait_stream(aside)
    contender.reset()
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph):
            contender.backward(contender.forward())
    finally:
        cuda.set_stream(home)  # a recording that fails as it ends leaves its own stream current
    return Contender(
        contender.name,
        forward=graph.replay,
        backward=lambda _: None,
        reset=lambda: None,
        path=contender.path,
    )
