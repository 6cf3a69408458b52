"""peak = max over time of the bytes allocated since the start of one forward + backward.

Outputs and gradients are included, weights and the input are not.  On CPU the profiler reports
each allocation and release with its time, temporaries inside library calls included; on a GPU the
caching allocator keeps the peak itself.  What a kernel takes past PyTorch's allocator is not seen:
of ours on a CPU the panel of each thread, of the library what it packs.
"""

import os
from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from decomp_kernels.bench.engine import Contender


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """The peak of the second step, with the gradients of the first dropped."""
    contender.reset()
    contender.backward(contender.forward())  # lazily made buffers are the library's, not the step's
    contender.reset()
    return _cuda_peak(contender, device) if device.type == "cuda" else _cpu_peak(contender)


def saved_bytes(contender: Contender, excluded: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, each counted once.

    ``excluded``: tensors whose storages exist anyway (parameters and buffers).
    """
    known = {part.untyped_storage().data_ptr() for tensor in excluded for part in _dense(tensor)}
    kept: WeakSet[_Kept] = WeakSet()  # those whose node a later detach let go are gone from it

    def pack(tensor: Tensor) -> _Kept:
        saved = _Kept(tensor.detach())  # an output holds on to its own node, which holds this
        kept.add(saved)
        return saved

    contender.reset()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = contender.forward()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for saved in kept
        for storage in (part.untyped_storage() for part in _dense(saved.tensor))
    }
    total = sum(size for address, size in storages.items() if address not in known)
    contender.backward(out)
    contender.reset()
    return total


class _Kept:
    """What autograd holds in place of a tensor that it saves."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the values: a sparse one has no storage of its own."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return (tensor,)


def _cpu_peak(contender: Contender) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # four lines a profile on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = contender.forward()
        contender.backward(out)
        del out
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    contender.reset()
    return peak


def _cuda_peak(contender: Contender, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    out = contender.forward()
    contender.backward(out)
    del out
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - start
    contender.reset()
    return peak
