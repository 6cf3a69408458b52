"""y of the methods that PEFT lacks, as their papers' code has it: separate linear calls, or W'.

A formula is made from a plain linear and the tensors of our adapter, so that both compute the same
function of the same values (tests/test_formulas.py holds outputs and gradients to ours).  Its
trained tensors all have one dtype, the adapter's, as a model converted with ``.to`` has them.

What a formula needs once is made once: W without its leading singular directions, for example.
Dropout is on the branch's input, as published; ours drops both terms of MiLoRA and of the additive
spectral adapter, which is the same in expectation and exact without dropout.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decomp_kernels.linear import DecomposedLinear
from decomp_kernels.methods.base import Adapter, Method
from decomp_kernels.methods.diff_pruning import GAMMA, ZETA

_CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


class Formula(nn.Module):
    """linear: frozen, its tensors are shared.  adapter: ours, whose tensors are copied under their
    names.  dtype: of all that float, the trained ones and the frozen.
    """

    base_weight: Tensor  # [N, K]
    base_bias: Tensor | None  # [N]

    if TYPE_CHECKING:  # the adapter's tensors, which are the method's business

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, linear: nn.Linear, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        self.method: Any = adapter.method
        self.dtype = dtype
        self.register_buffer("base_weight", linear.weight.detach())
        self.register_buffer("base_bias", None if linear.bias is None else linear.bias.detach())
        for name, tensor in adapter.named_parameters():
            self.register_parameter(name, nn.Parameter(tensor.detach().to(dtype, copy=True)))
        for name, held in adapter.named_buffers():
            floating = dtype if held.is_floating_point() else held.dtype
            self.register_buffer(name, held.to(floating, copy=True))
        self.dropout = nn.Dropout(getattr(self.method, "dropout", 0.0))
        self.prepare()

    def prepare(self) -> None:
        """Make what the published code makes once, before training."""

    def without(self, up: Tensor, down: Tensor) -> None:
        """Take up [N, r] down [r, K] out of the frozen weight, into a tensor of its own."""
        self.base_weight = (self.base_weight.to(self.dtype) - up @ down).to(self.base_weight.dtype)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base_weight, self.base_bias)

    def of_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), self.base_bias)


class Branch(Formula):
    """y = x W^T + b + branch(drop(x)), in the adapter's dtype and cast back, as PEFT does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(self.dropout(x).to(self.dtype)).to(x.dtype)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BitFit(Formula):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base_weight, self.bias.to(x.dtype))


class SSB(Formula):
    """y = x (row * W * col)^T + b: the scaled weight is made each time."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.out_scale[:, None] * self.base_weight * self.in_scale
        return self.of_weight(x, scaled)


class Mixed(Branch):
    """FLoRA and MoSLoRA: three linears one after another."""

    def branch(self, x: Tensor) -> Tensor:
        mixed = F.linear(F.linear(x, self.down), self.core_matrix)
        return F.linear(mixed, self.up) * self.method.scale


class TriLoRA(Branch):
    def branch(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down) * self.core, self.up) * self.method.scale


class LoRADash(Branch):
    """LoRA, and the chosen directions with their scales beside it."""

    def branch(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.down), self.up) * self.method.scale
        return low + F.linear(F.linear(x, self.direction_down) * self.core, self.direction_up)


class MiLoRA(Branch):
    """LoRA on a weight without what A and B started from."""

    def prepare(self) -> None:
        self.without(self.up0 * self.method.scale, self.down0)

    def branch(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.method.scale


class ParallelAdapter(Branch):
    def branch(self, x: Tensor) -> Tensor:
        t = _CURVES[self.method.activation](F.linear(x, self.down))
        return F.linear(t, self.up) * self.method.scale


class SeriesAdapter(Formula):
    """A bottleneck network on the linear's output, with its residual."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.base(x)
        t = _CURVES[self.method.activation](F.linear(z.to(self.dtype), self.down, self.down_bias))
        return z + (F.linear(t, self.up) * self.method.scale + self.up_bias).to(x.dtype)


class SAMParser(Formula):
    """W' = U diag(sigma + delta) V^T, made each time."""

    def prepare(self) -> None:
        values = ((self.left.T @ self.base_weight.to(self.dtype)) * self.right).sum(1)
        self.register_buffer("sigma", values)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_weight(x, (self.left * (self.sigma + self.delta)) @ self.right)


class SVDiff(Formula):
    """W' = U diag(relu(sigma + delta)) V^T, made each time."""

    def forward(self, x: Tensor) -> Tensor:
        values = F.relu(self.singular_values + self.delta)
        return self.of_weight(x, (self.left * values) @ self.right)


class DiffPruning(Formula):
    """W' = W + z * delta with its hard concrete mask, drawn in each training step."""

    def forward(self, x: Tensor) -> Tensor:
        log_alpha = self.log_alpha.to(torch.promote_types(self.dtype, torch.float32))
        if self.training:
            u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
            log_alpha = torch.log(u) - torch.log(1 - u) + log_alpha
        z = (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        return self.of_weight(x, self.base_weight + z * self.delta)


class SpectralAdditive(Branch):
    """The tuned triplets beside a weight without the untuned ones."""

    def prepare(self) -> None:
        scaled = self.singular_up * (self.singular_values * self.method.scale)
        self.without(scaled, self.singular_down)

    def branch(self, x: Tensor) -> Tensor:
        t = F.linear(x, self.singular_down + self.down_offset) * self.singular_values
        return F.linear(t, self.singular_up + self.up_offset) * self.method.scale


class SpectralRotational(Branch):
    """The turned triplets beside a weight without them; Cayley's rotation by an inverse."""

    def prepare(self) -> None:
        self.without(self.singular_up * self.singular_values, self.singular_down)

    def branch(self, x: Tensor) -> Tensor:
        t = F.linear(F.linear(x, self.singular_down), self.rotation(self.rotation_down).T)
        t = t * (self.singular_values * self.core)
        return F.linear(F.linear(t, self.rotation(self.rotation_up)), self.singular_up)

    def rotation(self, D: Tensor) -> Tensor:
        """R = (I - Q)(I + Q)^-1 [r, r] with Q = (D - D^T) / 2; an inverse needs float32."""
        D = D.to(torch.promote_types(D.dtype, torch.float32))
        Q, one = (D - D.T) / 2, torch.eye(len(D), dtype=D.dtype, device=D.device)
        return ((one - Q) @ torch.linalg.inv(one + Q)).to(self.dtype)


FORMULAS: dict[str, type[Formula]] = {
    "bitfit": BitFit,
    "diff_pruning": DiffPruning,
    "flora": Mixed,
    "lora_dash": LoRADash,
    "milora": MiLoRA,
    "moslora": Mixed,
    "parallel_adapter": ParallelAdapter,
    "sam_parser": SAMParser,
    "series_adapter": SeriesAdapter,
    "spectral_additive": SpectralAdditive,
    "spectral_rotational": SpectralRotational,
    "ssb": SSB,
    "svdiff": SVDiff,
    "trilora": TriLoRA,
}
_CURVED = ("parallel_adapter", "series_adapter")


def why_not(method: Method) -> str | None:
    """Why there is no formula for our method's instance; None where there is one."""
    if method.name not in FORMULAS:
        return f"no formula is written out for {method.name}"
    curve = getattr(method, "activation", "identity")
    if curve != "identity" and method.name not in _CURVED:
        return f"{method.name} with activation={curve!r} is ours alone: nobody published it"
    return None


def at_start(linear: nn.Linear, method: Method, dtype: torch.dtype | None = None) -> Formula:
    """The formula at our own start.  Raises ValueError where there is none.

    dtype: as ``DecomposedLinear`` has it.
    """
    if why := why_not(method):
        raise ValueError(f"{why}; the formulas are of {', '.join(FORMULAS)}")
    layer = DecomposedLinear(linear, method, dtype=dtype)
    widest = torch.promote_types(linear.weight.dtype, torch.float32) if dtype is None else dtype
    return of_adapter(linear, layer.adapters["default"], widest)


def of_adapter(linear: nn.Linear, adapter: Any, dtype: torch.dtype) -> Formula:
    """The formula with the values of an adapter of ours as they are now."""
    return FORMULAS[adapter.method.name](linear, adapter, dtype)
