"""``explain``: which implementation a layer takes, why, and what the roofline says of it.

The layer's own lowering runs on tensors without data (meta), which shows every call of the
operator with its terms, and counts what the small-tensor work around it computes and moves.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from decomp_kernels import dispatch, roofline, tables
from decomp_kernels.factors import (
    BlockRotate,
    DoubleHadamard,
    Factors,
    Hadamard,
    Scatter,
    SingularDiagonal,
    WeightMap,
)
from decomp_kernels.linear import Decomposed
from decomp_kernels.methods.base import Base
from decomp_kernels.reference.dropout import threshold
from decomp_kernels.roofline import GPUS, Ceilings, Step, Terms

PLAIN = "nn.Linear"


@dataclass(frozen=True)
class Direction:
    """Forward or backward of a layer.  seconds: by the roofline, None without a GPU's ceilings.

    share_of_roof: the time of all arithmetic at once, reading and writing each tensor once, over
    ``seconds``.  runner_up: the next best, by measurement where there is one and else by the
    roofline, as (implementation, seconds).
    """

    impl: str
    why: str
    flops: float
    bytes: float
    seconds: float | None
    share_of_roof: float | None
    over_frozen: float | None
    runner_up: tuple[str, float] | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns: printed, it is a table."""

    layer: str
    tokens: int
    device: str
    ceilings: str
    forward: Direction
    backward: Direction | None  # None where nothing needs a gradient

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values: times in seconds."""
        made = asdict(self)
        for name, direction in (("forward", self.forward), ("backward", self.backward)):
            if direction is not None:
                made[name]["steps"] = [step._asdict() for step in direction.steps]
                if direction.runner_up is not None:
                    impl, seconds = direction.runner_up
                    made[name]["runner_up"] = {"impl": impl, "seconds": seconds}
        return made

    def __str__(self) -> str:
        return _text(self)

    __repr__ = __str__


def explain(
    layer: nn.Module, tokens: int, device: str | None = None, *, training: bool = True
) -> Explanation:
    """Which implementation ``layer`` takes for ``tokens`` rows of x, why, and its roofline.

    layer: an adapted linear (``DecomposedLinear``, or one inside a model that ``adapt`` changed).
    device: the name of a GPU that need not be at hand (H200, H100, A100, RTX 4090, B200, MI300X);
    None is the layer's own device.  training: with the backward, x needing its gradient.  Times
    are lower bounds from FLOPs, bytes and the GPU's ceilings (``roofline.GPUS``), not measurements.
    """
    if not isinstance(layer, Decomposed):
        raise TypeError(
            f"layer must be an adapted linear, got {type(layer).__name__}; take one out of the "
            "model that decomp_kernels.adapt changed, such as model.layers[0].q_proj"
        )
    if isinstance(tokens, bool) or not hasattr(tokens, "__index__") or tokens < 1:
        raise ValueError(f"tokens must be a whole number of at least 1, got {tokens!r}")
    tokens = operator.index(tokens)
    if device is not None:
        names = {name.lower(): name for name in GPUS}
        if str(device).lower() not in names:
            raise ValueError(
                f"device must be one of {', '.join(GPUS)}, or None for the layer's own device, "
                f"got {device!r}"
            )
        device = names[device.lower()]
    module: Any = layer
    weight = module.base_weight()
    gpu, arch, where = _device(weight.device, device)

    def why_not(impl: str) -> str | None:
        if not isinstance(weight, torch.Tensor) and impl not in dispatch.TAKE_QUANTIZED:
            return "it takes no quantised weight"
        if device is None:
            return dispatch.why_not(weight, impl)
        if impl in dispatch.NATIVE_FORMS:
            return dispatch.why_not_native_on(arch, weight.dtype, impl)
        wide = weight.dtype == torch.float64 and impl not in dispatch.EVERYWHERE
        return "its kernels do not take float64" if wide else None

    calls, impl, has, around = _calls(module, tokens, training)
    directions = []
    for back in (False, True) if training else (False,):

        def decide(terms: Terms, direction: str = "backward" if back else "forward"):
            if impl is None:
                return dispatch.Choice(PLAIN, _state(module))
            work = _work(terms, direction)
            return dispatch.decide(impl, has, arch, lambda: work, why_not)

        directions.append(_direction(calls, around[back], decide, why_not, gpu, back, has))
    return Explanation(
        _describe(module), tokens, where, gpu.source if gpu else "none known for this device",
        directions[0], directions[1] if training else None,
    )  # fmt: skip


def _direction(
    calls: list[Terms],
    around: Step,
    decide: Callable[[Terms], dispatch.Choice],
    why_not: Callable[[str], str | None],
    gpu: Ceilings | None,
    back: bool,
    has: Sequence[str],
) -> Direction:
    listed = roofline.backward if back else roofline.forward
    choice = decide(calls[0])
    # The definition and a plain linear do what library calls do, and are not costed apart.
    costed = "aten" if choice.impl in ("reference", PLAIN) else choice.impl

    def steps_of(impl: str) -> list[Step]:
        steps = [step for terms in calls for step in listed(terms, impl)]
        return [*steps, around] if around.bytes else steps

    steps = steps_of(costed)
    flops, moved = roofline.total(steps)
    if gpu is None:
        return Direction(choice.impl, choice.why, flops, moved, None, None, None, None, (*steps,))
    least = [roofline.roof(terms, back=back) for terms in calls]
    frozen = [
        step for terms in calls[:1] for step in listed(roofline.without_branch(terms), "aten")
    ]
    spent = roofline.seconds(steps, gpu)
    others = [
        impl
        for impl in dispatch.CANDIDATES
        if impl in has and impl != costed and why_not(impl) is None
    ]
    times = sorted((roofline.seconds(steps_of(impl), gpu), impl) for impl in others)
    if choice.measured and "relative" in choice.measured:
        relative = choice.measured["relative"]["backward" if back else "forward"]
        times = sorted(
            (spent * ratio / relative[costed], impl)
            for impl, ratio in relative.items()
            if impl != costed
        )
    return Direction(
        choice.impl, choice.why, flops, moved, spent,
        roofline.seconds(least, gpu) / spent,
        spent / roofline.seconds(frozen, gpu),
        (times[0][1], times[0][0]) if times else None,
        (*steps,),
    )  # fmt: skip


def _calls(
    module: Any, tokens: int, training: bool
) -> tuple[list[Terms], str | None, tuple[str, ...], list[Step]]:
    """The operator's calls in one forward, the layer's ``impl`` and those that its method has, and
    the work around the calls, which is counted as library calls do it.
    """
    name = module.active_adapter
    weight = module.base_weight()
    N, K = weight.shape
    if name is None or module.disabled or module.merged_adapter is not None:
        plain = Terms(tokens, N, K, element=weight.dtype.itemsize, training=training)
        return [plain], None, (), [Step("", 0, 0), Step("", 0, 0)]
    adapter = module.adapters[name]
    if not adapter.initialized:
        raise RuntimeError(f"adapter {name!r} has no values yet; call decomp_kernels.initialize")
    asked, trained_weight = adapter.method, weight.requires_grad
    found: list[Terms] = []
    small: list[Tensor] = []

    class Recording(type(asked)):  # type: ignore[misc]
        def apply(self, factors: Factors, base: Base, x: Tensor, dropout=0.0, seed=None) -> Tensor:
            terms = _terms(factors, base, x, dropout, training)
            found.append(replace(terms, trained_weight=trained_weight or terms.trained_weight))
            small.extend(_tensors(factors))
            return x.new_empty((*x.shape[:-1], N)).requires_grad_()

    method = copy.copy(replace(asked, impl="aten"))  # the one that runs on tensors without data
    object.__setattr__(method, "__class__", Recording)
    ghost = copy.deepcopy(adapter).to("meta")
    bias = None if module.bias is None else module.bias.to("meta")
    base = Base(torch.empty((N, K), dtype=weight.dtype, device="meta"), bias, weight.dtype)
    x = torch.empty(tokens, K, dtype=weight.dtype, device="meta", requires_grad=training)
    counted = []
    with _Counting() as counting:
        out = method.forward(ghost, base, x, training)
    counted.append(Step("own tensors, by library calls", counting.flops, counting.bytes))
    made = [t for t in (*small, out) if t.requires_grad and t.grad_fn is not None]
    with _Counting() as counting:
        if made and training:
            torch.autograd.grad(
                made, [x, *(p for p in ghost.parameters() if p.requires_grad)],
                [torch.empty_like(t) for t in made], allow_unused=True,
            )  # fmt: skip
    counted.append(Step("own tensors, by library calls", counting.flops, counting.bytes))
    return found, asked.impl, asked.impls, counted


def _terms(factors: Factors, base: Base, x: Tensor, dropout: float, training: bool) -> Terms:
    """The call's terms as the cost model has them."""
    (N, K), down = base.weight.shape, factors.down
    scales = [t for t in (factors.in_scale, factors.out_scale) if t is not None]
    branch = [t for t in (down, factors.up) if t is not None]
    weight_map = factors.weight_map
    return Terms(
        x.shape[0], N, K,
        r=0 if down is None else down.shape[0],
        element=x.element_size(),
        adapter=x.element_size() if down is None else down.element_size(),
        in_scale=factors.in_scale is not None,
        out_scale=factors.out_scale is not None,
        addend=factors.addend is not None,
        dropout=down is not None and threshold(dropout) > 0,
        training=training,
        trained_factors=any(t.requires_grad for t in branch),
        trained_scales=any(t.requires_grad for t in scales),
        trained_bias=factors.bias is not None and factors.bias.requires_grad,
        trained_weight=factors.weight is not None and factors.weight.requires_grad,
        weight_map=None if weight_map is None else weight_map.op,
        map_size=0 if weight_map is None else _map_size(weight_map),
    )  # fmt: skip


def _map_size(m: WeightMap) -> int:
    match m:
        case Hadamard():
            return m.down.shape[0]
        case DoubleHadamard():
            return max(m.down1.shape[0], m.down2.shape[0])
        case BlockRotate():
            return m.blocks.shape[0] * m.blocks.shape[2]
        case SingularDiagonal():
            return m.diagonal.shape[0]
        case Scatter():
            return m.values.shape[0]
    raise TypeError(f"{type(m).__name__} is no weight map")


def _tensors(factors: Factors) -> list[Tensor]:
    own = [value for value in factors if isinstance(value, Tensor)]
    mapped = factors.weight_map.named_tensors().values() if factors.weight_map else ()
    return [*own, *mapped]


def _work(terms: Terms, direction: str) -> dispatch.Work:
    base = tables.width(terms.element == 4)
    adapter = tables.width(terms.element == 4 or terms.mixed)
    NK = terms.N * terms.K
    return dispatch.Work(
        "decomposed_linear", direction, terms.M, NK, terms.r, base, adapter, terms.dropout,
        terms.out_scale,
    )  # fmt: skip


def _device(at_hand: torch.device, named: str | None) -> tuple[Ceilings | None, str, str]:
    """(ceilings, architecture, what to call it)."""
    if named is not None:
        return GPUS[named], GPUS[named].arch, f"{named} ({GPUS[named].arch})"
    arch = dispatch.architecture(at_hand)
    name = dispatch.device_name(at_hand)
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
    return gpu, arch, f"{name} ({arch})" if arch != dispatch.ANY else name


_BODY = torch._C.DispatchKey.CompositeExplicitAutograd  # as every operator of ours is registered
_MOVES_NOTHING = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
_WRITES_FIRST = {torch.ops.aten.copy_, torch.ops.aten.new_zeros, torch.ops.aten.new_full}


class _Counting(TorchDispatchMode):
    """FLOPs of products and bytes of every tensor that a library call reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry  # it imports triton

        kwargs, packet = kwargs or {}, func._overloadpacket
        if func.namespace == "decomp_kernels":  # count what its body does
            with self:
                return func._op_dk(_BODY, *args, **kwargs)
        if packet not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        product = getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)  # addmm_
        if product in flop_registry:
            self.flops += flop_registry[product](*args, **kwargs, out_val=out)
        outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if packet in _MOVES_NOTHING:
            return out
        args = args[1:] if packet in _WRITES_FIRST else args
        inputs = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        view = outputs and all(t.untyped_storage()._cdata in known for t in outputs)
        if not view or func._schema.is_mutable:
            self.bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return out


def _describe(module: Any) -> str:
    N, K = module.base_weight().shape
    name = module.active_adapter
    method = "no adapter" if name is None else repr(module.adapters[name].method)
    dtype = str(module.base_weight().dtype).removeprefix("torch.")
    return f"{method} on {K} -> {N}, {dtype}"


def _state(module: Any) -> str:
    """Why the layer is a plain linear now."""
    if module.active_adapter is None:
        return "it has no active adapter"
    if module.merged_adapter is not None:
        return f"its adapter {module.merged_adapter!r} is merged"
    return "it is inside dk.disable"


def _si(value: float, unit: str) -> str:
    """Three digits and a prefix: 275 GFLOP."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}" if value < 999.5 * size else (
                f"{value / size:.0f} {prefix}{unit}")  # fmt: skip
    return f"0 {unit}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"


def _text(e: Explanation) -> str:
    lines = [f"{e.layer}", f"{e.tokens} tokens, {e.device}"]
    for name, d in (("forward", e.forward), ("backward", e.backward)):
        if d is None:
            continue
        lines += ["", f"{name:<9} {d.impl}: {d.why}"]
        amount = f"          {_si(d.flops, 'FLOP')}, {_si(d.bytes, 'B')}"
        if d.seconds is None or d.share_of_roof is None or d.over_frozen is None:
            lines.append(amount)
        else:
            lines.append(
                f"{amount}, at least {_time(d.seconds)}: {d.share_of_roof:.0%} of the roof, "
                f"{d.over_frozen:.2f} x the frozen linear"
            )
        if d.runner_up is not None and d.seconds:
            impl, seconds = d.runner_up
            lines.append(f"          runner-up {impl}: {seconds / d.seconds:.2f} x this time")
        for step in d.steps:
            flops = _si(step.flops, "FLOP")
            lines.append(f"            {step.name:<34} {flops:>12} {_si(step.bytes, 'B'):>10}")
    lines += ["", f"ceilings: {e.ceilings}", "times are lower bounds by the roofline"]
    return "\n".join(lines)
