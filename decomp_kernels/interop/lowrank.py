"""Adapters whose update is of low rank as plain LoRA.

    W' = W + scale * up diag(core) down        ->        W' = W + B A,  lora_alpha = r

It is read off the factors that a method lowers to, so that no list of methods is kept.  What is no
such branch is refused, or where a rank is given replaced by the nearest matrix of that rank, from
the singular value decomposition of W' - W (Eckart, Young 1936).
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decomp_kernels.interop.contents import which_adapter
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.base import Adapter, Base, Method
from decomp_kernels.methods.lora import LoRA
from decomp_kernels.ops.tiled_weight import dense


class LoRALayer(NamedTuple):
    """What became of one layer: its rank, and the 2-norms of the update and of what is lost."""

    rank: int
    update: float
    lost: float

    @property
    def error(self) -> float:
        """||W'_LoRA - W'|| / ||W' - W||, Frobenius; 0 where the update is exact."""
        return self.lost / self.update if self.lost else 0.0


class LoRAReport(dict[str, LoRALayer]):
    """The layers by path."""

    @property
    def error(self) -> float:
        """As of one layer, over all of them together."""
        lost = sum(layer.lost**2 for layer in self.values())
        return (lost / sum(layer.update**2 for layer in self.values())) ** 0.5 if lost else 0.0


@torch.no_grad()
def as_lora(
    model: nn.Module, adapter_name: str | None = None, rank: int | None = None
) -> LoRAReport:
    """Replace an adapter of ``model`` on every layer by the LoRA that computes the same, in place.

    adapter_name: which one; None is the active one.  Exact, but for one rounding of B to the
    adapter's dtype, where the update is a low-rank branch: LoRA itself, PiSSA and MiLoRA (rank
    2 r), AdaLoRA, VeRA, HRA, and so on; ranks that are zero are left out.  Others are refused with
    ValueError, and nothing is changed, unless ``rank`` allows the nearest update of that rank:
    layers whose exact rank is higher get it too.  The dropout stays.  Returns what each layer
    became.
    """
    if rank is not None and type(rank) is not int:
        raise TypeError(f"rank must be an int or None, got {rank!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    every = adapted_layers(model)
    name = which_adapter(every, adapter_name)
    layers = {path: layer for path, layer in every.items() if name in layer.adapters}
    made: dict[str, Adapter] = {}
    report = LoRAReport()
    for path, layer in layers.items():
        adapter = layer.adapters[name]
        where = path or "the model"
        if layer.merged_adapter is not None:
            raise RuntimeError(f"{where} is merged; call unmerge(model) first")
        if not adapter.initialized:
            raise RuntimeError(f"the adapter of {where} has no values yet; call initialize(model)")
        made[path], report[path] = _converted(adapter, layer.base(path), rank)
    for path, layer in layers.items():
        layer.adapters[name] = made[path].train(layer.training)
        if layer.active_adapter is not None:
            layer.set_adapter(layer.active_adapter)
    return report


def _converted(adapter: Adapter, base: Base, rank: int | None) -> tuple[Adapter, LoRALayer]:
    method = adapter.method
    why = why_not_exact(method, adapter, base)
    if why is None:
        down, up = branch(method, adapter, base)
        update = _norm(down, up)
        if type(method) is LoRA and (rank is None or method.r <= rank):
            return adapter, LoRALayer(method.r, update, 0.0)  # with its scale and its bias on B
        if rank is None or len(down) <= rank:
            return _lora(method, down, up), LoRALayer(len(down), update, 0.0)
    if rank is None:
        raise ValueError(
            f"{type(method).__name__} on {base.name or 'the model'} is not exactly a LoRA: {why}; "
            "give a rank for the nearest update of that rank (`rank=`, `--rank`)"
        )
    U, S, Vt = torch.linalg.svd(update_of(method, adapter, base), full_matrices=False)
    root = S[:rank].sqrt()
    down, up = root[:, None] * Vt[:rank], U[:, :rank] * root
    dtype = next((p.dtype for p in adapter.parameters() if p.dim() == 2), base.scale_dtype)
    made = _lora(method, down.to(dtype), up.to(dtype))
    return made, LoRALayer(len(root), float(S.norm()), float(S[rank:].norm()))


def why_not_exact(method: Method, adapter: Adapter, base: Base) -> str | None:
    """None where the update is a low-rank branch, else the reason why it is none."""
    if type(method).lower is Method.lower:
        return "it is no single call of the operator"
    factors = method.lower(adapter, base)
    if factors.weight_map is not None:
        return "it changes the whole weight"
    if factors.in_scale is not None:
        return "it scales what the base weight takes in"
    if factors.out_scale is not None:
        return "it scales what the base weight gives out"
    if factors.activation != "identity":
        return f"it has a {factors.activation} between down and up"
    if factors.bias is not None and type(method) is not LoRA:
        return "it changes the bias"
    if factors.down is None or factors.weight is not None or factors.addend is not None:
        return "its update is no product of two matrices"
    return None


def branch(method: Method, adapter: Adapter, base: Base) -> tuple[Tensor, Tensor]:
    """(down [r, K], up [N, r]) with W' = W + up down, without the ranks that are zero."""
    factors = method.lower(adapter, base)
    assert factors.down is not None and factors.up is not None  # noqa: PT018 - why_not_exact
    up = factors.scale * factors.up.double()
    if factors.core is not None:
        up = up * factors.core.double()
    _check_finite(up, base)
    used = (factors.down != 0).any(1) & (up != 0).any(0)
    used[0] |= not used.any()  # a LoRA has a rank of at least 1
    down = factors.down.detach()
    return down[used].clone(), up[:, used].to(down.dtype)


def update_of(method: Method, adapter: Adapter, base: Base) -> Tensor:
    """W' - W, [N, K] float64.  Raises ValueError where the layer is no such linear."""
    where = base.name or "the model"
    if method.why_not_mergeable is not None:
        raise ValueError(f"{where} is not linear in x: {method.why_not_mergeable}")
    exact = copy.deepcopy(adapter).double()
    weight = dense(base.weight.detach(), torch.float64)
    bias = None if base.bias is None else base.bias.detach().double()
    wide = base._replace(weight=weight, bias=bias, dtype=torch.float64)
    method.refresh(exact, wide)
    merged, merged_bias = method.merged(exact, wide)
    update = merged - weight
    _check_finite(update, base)
    if (merged_bias is None) != (bias is None) or not (
        bias is None or merged_bias is None or torch.equal(merged_bias, bias)
    ):
        raise ValueError(
            f"{type(method).__name__} on {where} changes the bias, which no update of the weight "
            "does; keep its own format"
        )
    return update


def _check_finite(update: Tensor, base: Base) -> None:
    if torch.isfinite(update).all():
        return
    where = base.name or "the model"
    if not torch.isfinite(dense(base.weight.detach(), torch.float32)).all():  # as of a stand-in
        raise ValueError(
            f"the update of {where} is computed from its base weight, which must be at hand, and "
            "it is not or holds NaN or infinity (a conversion needs --base here)"
        )
    raise ValueError(
        f"the update of {where} must be finite, and it holds NaN or infinity; look at the values "
        "of the adapter"
    )


def _lora(method: Method, down: Tensor, up: Tensor) -> Adapter:
    r = len(down)
    made = Adapter(LoRA(r=r, alpha=float(r), dropout=getattr(method, "dropout", 0.0)))
    made.down, made.up = nn.Parameter(down.contiguous()), nn.Parameter(up.contiguous())
    made.initialized = True
    return made


def _norm(down: Tensor, up: Tensor) -> float:
    """||up down||_F without the product."""
    down, up = down.double(), up.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())
