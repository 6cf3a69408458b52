"""The contenders of one layer: frozen, control, ours, PEFT's ways, and the written-out formula.

Each has its own copy of the same random weight.  Trained tensors are away from their start, and a
frozen one that starts at zero is filled, so that no operand is zero.  Ours by every implementation,
ours compiled and the formula have the same values.  Each says what it took from what was seen of it
while it ran, not from what it was asked for.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from decomp_kernels import dispatch
from decomp_kernels.bench import engine, formulas, observed, peers, peers_gpu
from decomp_kernels.bench.compiled import Compiled
from decomp_kernels.bench.engine import CONTROL, FROZEN, Contender
from decomp_kernels.interop.peft.accelerate import accelerate, fused_calls, peft_lines
from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods.base import Adapter, Method

OURS, OURS_COMPILED = "ours", "ours, compiled"
PEFT, PEFT_WIDE = "PEFT", "PEFT, float32 adapters"
ACCELERATED, PEFT_COMPILED = "PEFT, accelerate()", "PEFT, compiled"
FORMULA = "formula"


@dataclass(eq=False)
class Entry:
    """A contender with its module; ``compiled`` where torch.compile runs it."""

    contender: Contender
    module: nn.Module
    path: str = ""
    calls: Sequence[str] = ()
    compiled: Compiled | None = None


class Contenders:
    """Those of one method on one layer, in ``entries``; ``left_out``: who is not in it, and why.

    shape: (M, K, N).  impls: implementations of ours beside what auto takes; those that the method
    lacks, that cannot run here and that auto takes anyway are left out.  others: PEFT and the
    formula too.  compile_too: ours and PEFT's under torch.compile.
    """

    def __init__(
        self,
        method: Method,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        adapter_dtype: torch.dtype,
        bias: bool,
        *,
        seed: int,
        device: torch.device,
        impls: Sequence[str] = (),
        others: bool = True,
        compile_too: bool = False,
    ) -> None:
        M, K, N = shape
        torch.manual_seed(seed)
        self.x = torch.randn(M, K, device=device).to(dtype)
        self.dy = torch.randn(M, N, device=device).to(dtype)
        self._weight = torch.randn(N, K, device=device).div_(K**0.5).to(dtype)
        self._bias = torch.randn(N, device=device).to(dtype) if bias else None
        self.entries: list[Entry] = []
        self.left_out: dict[str, str] = {}
        self.method, self.adapter_dtype = method, adapter_dtype
        for name in (FROZEN, CONTROL):
            self._add(name, self.linear(), lambda seen: seen.path() or "nn.Linear")
        self.ours = DecomposedLinear(self.linear(), method, dtype=adapter_dtype)
        leave_the_start(self.ours)
        taken = self._add(OURS, self.ours, lambda seen: seen.path()).path
        self._by_name(impls, taken)
        if others:
            self._peft()
            self._formula()
            for name in peers_gpu.NAMES if device.type == "cuda" else ():
                self._on_gpu(name)
        if compile_too:
            torch._dynamo.reset()  # eight compilations of one forward are all that there may be
            self._compiled(OURS_COMPILED, copy.deepcopy(self.ours))
            for entry in [entry for entry in self.entries if entry.contender.name == PEFT]:
                self._compiled(PEFT_COMPILED, copy.deepcopy(entry.module))

    def linear(self) -> nn.Linear:
        """A frozen linear with a copy of the weight."""
        N, K = self._weight.shape
        made = nn.Linear(K, N, bias=self._bias is not None, device="meta", dtype=self._weight.dtype)
        made.weight = nn.Parameter(self._weight.clone(), requires_grad=False)
        if self._bias is not None:
            made.bias = nn.Parameter(self._bias.clone(), requires_grad=False)
        return made

    def _add(
        self,
        name: str,
        module: nn.Module,
        path: Callable[[observed.Observed], str],
        compiled: Compiled | None = None,
    ) -> Entry:
        contender = engine.layer(name, module if compiled is None else compiled, self.x, self.dy)
        if compiled is not None:
            compiled.prepare(lambda: engine.step(contender))
            contender.reset()
        seen = observed.observe(contender)
        entry = Entry(contender, module, path(seen), seen.lines(), compiled)
        self.entries.append(entry)
        return entry

    def _by_name(self, impls: Sequence[str], taken: str) -> None:
        for impl in impls:
            why = dispatch.why_not(self.x, impl)
            if impl not in self.method.impls:
                why = f"{self.method.name} has no such form"
            elif why is None and impl == observed.implementation(taken):
                why = "it is what ours took"
            if why is not None:
                self.left_out[impl] = why
                continue
            module: Any = copy.deepcopy(self.ours)
            adapter = module.adapters["default"]
            adapter.method = replace(self.method, impl=impl)
            self._add(impl, module, lambda seen: seen.path())

    def _peft(self) -> None:
        if why := peers.why_not(self.method):
            self.left_out[PEFT] = why
            return
        try:
            layer = peers.peft_layer(self.method, self.linear(), self.adapter_dtype)
        except ValueError as error:  # options or shapes that it does not take
            self.left_out[PEFT] = f"PEFT refuses it: {str(error).splitlines()[0]}"
            return
        leave_the_start(layer)
        self._add(PEFT, layer, lambda seen: _theirs(peers.described(layer), seen))
        if self.adapter_dtype == self.x.dtype != torch.float32:
            wide = peers.peft_layer(self.method, self.linear(), torch.float32)
            if {p.dtype for p in wide.parameters()} == {p.dtype for p in layer.parameters()}:
                self.left_out[PEFT_WIDE] = "PEFT keeps its adapters in the base's dtype"
            else:
                leave_the_start(wide)
                self._add(PEFT_WIDE, wide, lambda seen: _theirs(peers.described(wide), seen))
        fast = copy.deepcopy(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a layer that has no form: peft_lines says so
            accelerate(fast)
        fused = None

        def path(seen: observed.Observed) -> str:
            nonlocal fused
            fused, calls = fused_calls(fast)
            return f"{fused} of {calls} calls fused, {seen.path()}"

        self._add(ACCELERATED, fast, path)
        if not fused:
            self.entries.pop()
            self.left_out[ACCELERATED] = "; ".join(peft_lines(fast)).removeprefix(": ")

    def _formula(self) -> None:
        if why := formulas.why_not(self.method):
            self.left_out[FORMULA] = why
            return
        adapter = self.ours.adapters["default"]
        made = formulas.of_adapter(self.linear(), adapter, self.adapter_dtype)
        self._add(FORMULA, made, lambda seen: _theirs("written out", seen))

    def _on_gpu(self, name: str) -> None:
        if why := peers_gpu.why_not(name, self.method, self._bias is not None):
            self.left_out[name] = why
            return
        adapter = self.ours.adapters["default"]
        try:
            made = peers_gpu.layer(name, self.linear(), adapter, self.adapter_dtype)
            apart = peers_gpu.difference(made, self.ours, self.x)
            if apart > peers_gpu.SAME:
                self.left_out[name] = f"it computes something else: {apart:.1%} from ours"
                return
            self._add(name, made, lambda seen: _theirs(peers_gpu.described(name, made), seen))
        except Exception as error:  # another package's kernel must not lose the row
            self.left_out[name] = f"it fails: {type(error).__name__}: {str(error)[:200]}"

    def _compiled(self, name: str, module: nn.Module) -> None:
        compiled = Compiled(module)

        def path(seen: observed.Observed) -> str:
            return ", ".join(part for part in (compiled.path(), seen.path()) if part)

        try:
            self._add(name, module, path, compiled)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.left_out[name] = f"torch.compile failed: {str(error).strip().splitlines()[0]}"


def _theirs(path: str, seen: observed.Observed) -> str:
    """The path of what is not ours; were one of our kernels in it, that would be in it too."""
    return f"{path}, ours: {'; '.join(seen.lines())}" if seen.calls else path


@torch.no_grad()
def leave_the_start(module: nn.Module) -> None:
    """Add noise to what is trained, LoRA's B for one, and fill our frozen tensors of zeros, such as
    LoRA-Dash's directions before they are chosen: zeros are fast.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for adapter in module.modules():
        for buffer in adapter.buffers(recurse=False) if isinstance(adapter, Adapter) else ():
            if buffer.is_floating_point() and not buffer.any():
                buffer.copy_(torch.randn_like(buffer) * 0.02)
