"""What a method is: options, the tensors it makes, and how it lowers them to factors.

A method is a frozen dataclass under ``@method("name")``.  It defines ``create``, which makes all
its tensors from the loaded weight, and ``lower``, which turns them into ``Factors`` in every
forward; PyTorch's autograd carries the gradients through that small-tensor work.  A method that is
no single call of the operator overrides ``forward`` and, where it can be merged, ``merged``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    TypeVar,
    dataclass_transform,
    get_args,
    get_type_hints,
)

import torch
from torch import Tensor, nn

from decomp_kernels import dispatch
from decomp_kernels.factors import ACTIVATIONS, Factors
from decomp_kernels.ops.decomposed_linear import decomposed_linear
from decomp_kernels.ops.merged_weight import merged_weight
from decomp_kernels.ops.tiled_weight import dense
from decomp_kernels.peft_form import PeftForm
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.sharding import is_sharded

METHODS: dict[str, type["Method"]] = {}

# PEFT's spellings, accepted by every method that has the option.
ALIASES = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


class Base(NamedTuple):
    """The frozen linear that a method adapts: y = x weight^T + bias."""

    weight: Tensor | QuantizedWeight  # [N, K]
    bias: Tensor | None  # [N]
    dtype: torch.dtype  # of the adapter's matrices; its scales are float32 or wider
    name: str = ""  # the module's path in the model, for messages
    shared: dict[str, nn.Parameter] | None = None  # what Method.share made, once for all layers

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def scale_dtype(self) -> torch.dtype:
        """bf16 near 1 moves in steps of 2^-8: a scale in it would not see small updates."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def matrix(self, *shape: int, fill: float = 0.0) -> nn.Parameter:
        """A trainable tensor in the adapter's dtype."""
        return nn.Parameter(torch.full(shape, fill, dtype=self.dtype, device=self.weight.device))

    def scales(self, count: int, fill: float = 1.0) -> nn.Parameter:
        """A trainable vector of scales, float32 or wider."""
        full = torch.full((count,), fill, dtype=self.scale_dtype, device=self.weight.device)
        return nn.Parameter(full)

    def kaiming(self, rows: int, cols: int) -> nn.Parameter:
        """U(-1/sqrt(cols), 1/sqrt(cols)): nn.Linear's own initialisation, as LoRA's A has it."""
        made = self.matrix(rows, cols)
        nn.init.kaiming_uniform_(made, a=math.sqrt(5))
        return made

    def normal(self, rows: int, cols: int, std: float) -> nn.Parameter:
        made = self.matrix(rows, cols)
        nn.init.normal_(made, std=std)
        return made

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in ``dtype``; a quantised one is dequantised whole."""
        return dense(self.weight, dtype)

    def finite_weight(self) -> Tensor:
        """The weight without a gradient, float32 or wider; raises where it cannot be decomposed."""
        weight = self.dense(self.scale_dtype).detach()
        if weight.device.type != "meta" and not torch.isfinite(weight).all():
            raise ValueError(
                f"the weight of {self.name or 'this layer'} must be finite for a singular value "
                "decomposition, but it holds NaN or infinity; load the weights first, or exclude "
                "this module"
            )
        return weight

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [N, k], S [k] descending, Vt [k, K] of the weight, k = min(N, K), float32 or wider."""
        return torch.linalg.svd(self.finite_weight(), full_matrices=False)


class Adapter(nn.Module):
    """The tensors of one method on one linear, under ``adapters.<name>`` of the layer."""

    def __init__(self, method: "Method") -> None:
        super().__init__()
        self.method = method
        self.initialized = False  # False while the base weight has no values yet (meta device)
        self.frozen: set[str] = set()  # parameters that never train, such as VeRA's projections

    def forward(self, base: Base, x: Tensor, training: bool) -> Tensor:
        """The layer calls its adapter as a module, so that hooks on it run: FSDP2's gather the
        tensors of an adapter that is a unit of its own, and accelerate's bring them to the device.
        """
        if is_sharded(base.weight):
            raise RuntimeError(
                "the weight under the adapter lies in shards on several processes; run the model "
                "through its outermost fully_shard module, and for tensor parallel plan this layer "
                "with the styles of decomp_kernels.interop.tensor_parallel"
            )
        return self.method.forward(self, base, x, training)

    def extra_repr(self) -> str:
        return repr(self.method)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = self.state_dict(keep_vars=True)
        if all(prefix + name in state_dict and not t.is_meta for name, t in own.items()):
            self.initialized = True  # trained values have come: initialize() leaves them alone

    if TYPE_CHECKING:  # which tensors there are is the method's business

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


class Holder:
    """A module that holds adapters of one linear, one of them at work: ours, and PEFT's of ours."""

    def current(self) -> Adapter | None:
        """The adapter that is active, None where there is none."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight holds an adapter at present."""
        raise NotImplementedError

    def base(self, path: str = "", dtype: torch.dtype | None = None) -> Base:
        """The frozen linear as methods see it: weight [out, in] and bias [out].

        dtype: of the matrices of an adapter that is made for it; None is the weight's own.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of the methods; see the module's docstring.

    impl: the implementation of the operator, one of ``dispatch.IMPLS``.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    citation: ClassVar[str]
    trains: ClassVar[str]  # trainable parameters of one layer, as a formula
    peft_form: ClassVar[PeftForm | None] = None  # where PEFT has the same method
    peft: ClassVar[str] = "none"  # the PEFT configuration that computes the same function
    identity_at_start: ClassVar[bool] = True
    full_rank_limit: ClassVar[bool] = False  # True where r above min(N, K) has no meaning
    impls: ClassVar[tuple[str, ...]] = dispatch.IMPLS  # those that its forward has
    aliases: ClassVar[dict[str, str]] = {}  # further spellings of its options, as ALIASES

    impl: str = "auto"

    def __post_init__(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Raise ValueError or TypeError for options that cannot be right on any layer."""
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_type(f"{type(self).__name__}({field.name}=...)", getattr(self, field.name),
                        hints[field.name])  # fmt: skip
        dispatch.check(self.impl)
        if self.impl not in self.impls:
            raise ValueError(
                f"{type(self).__name__} has no {self.impl} form: impl must be one of "
                f"{', '.join(self.impls)}"
            )
        for option in ("r", "target_r"):
            rank = getattr(self, option, None)
            if rank is not None and rank < 1:
                raise ValueError(f"{option} must be at least 1, got {rank}")
        dropout = getattr(self, "dropout", 0.0)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        activation = getattr(self, "activation", "identity")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )

    def check_shape(self, out_features: int, in_features: int, name: str) -> None:
        """Raise ValueError where this method does not fit a layer of this shape."""
        limit, rank = min(out_features, in_features), getattr(self, "r", 1)
        if self.full_rank_limit and rank > limit:
            raise ValueError(
                f"r must be at most min(out_features, in_features) = {limit} for "
                f"{name or 'this layer'} with {type(self).__name__}, got {rank}; "
                "lower r or exclude this module"
            )

    @classmethod
    def small(cls) -> "Method":
        """An instance that fits a layer of a few dozen features; tests and examples use it."""
        options: dict[str, Any] = {"r": 4} if "r" in {f.name for f in fields(cls)} else {}
        return cls(**options)

    @property
    def why_not_mergeable(self) -> str | None:
        """None where the adapted layer is a linear again, else the reason why it is not."""
        activation = getattr(self, "activation", "identity")
        if activation == "identity":
            return None
        return f"its branch has a {activation} between down and up, so it is no linear map of x"

    def share(
        self, layers: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Parameter]:
        """Frozen tensors that exist once for all adapted layers; layers: (N, K) of each."""
        return {}

    def create(self, adapter: Adapter, base: Base) -> None:
        """Make the parameters and buffers of one layer, all from its loaded weight."""
        raise NotImplementedError

    def refresh(self, adapter: Adapter, base: Base) -> None:
        """Make anew what was derived from the base weight, which was loaded or converted.

        Also where the adapter comes from a file: of its buffers only persistent ones are in there.
        """

    def check_values(self, adapter: Adapter, base: Base) -> None:
        """Raise ValueError where tensors of the right shapes hold what cannot be, from a file."""

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        """The factors of this forward.  Methods that override forward and merged need none."""
        raise NotImplementedError

    def forward(self, adapter: Adapter, base: Base, x: Tensor, training: bool) -> Tensor:
        """y [..., N] of x [..., K]."""
        dropout = getattr(self, "dropout", 0.0) if training else 0.0
        return self.apply(self.lower(adapter, base), base, x, dropout)

    def apply(
        self,
        factors: Factors,
        base: Base,
        x: Tensor,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """The operator on these factors."""
        return decomposed_linear(
            x,
            base.weight if factors.weight is None else factors.weight,
            base.bias if factors.bias is None else factors.bias,
            down=factors.down,
            up=factors.up,
            core=factors.core,
            scale=factors.scale,
            in_scale=factors.in_scale,
            out_scale=factors.out_scale,
            addend=factors.addend,
            activation=factors.activation,
            dropout=dropout,
            seed=seed,
            weight_map=factors.weight_map,
            save_output=factors.save_output,
            impl=self.impl,
        )

    def merged(self, adapter: Adapter, base: Base) -> tuple[Tensor, Tensor | None]:
        """(weight [N, K], bias [N] or None) of the nn.Linear that computes the same function.

        float32 arithmetic (float64 for float64), one rounding to the base's dtype.
        """
        factors = self.lower(adapter, base)
        weight: Tensor = base.dense(base.weight.dtype) if factors.weight is None else factors.weight
        if factors.weight_map is not None:
            definition = import_module(f"decomp_kernels.reference.{factors.weight_map.op}")
            weight = definition.build(factors.weight_map, weight.to(base.scale_dtype))
        merged = merged_weight(
            weight, factors.down, factors.up, factors.core, factors.in_scale, factors.out_scale,
            factors.scale, self.impl,
        )  # fmt: skip
        bias = base.bias if factors.bias is None else factors.bias
        dtype = base.weight.dtype
        if base.bias is not None and not isinstance(base.weight, Tensor):
            return merged.to(dtype), bias.to(base.bias.dtype)  # type: ignore[union-attr]
        return merged.to(dtype), None if bias is None else bias.to(dtype)


@dataclass(frozen=True, kw_only=True)
class LowRank(Method):
    """Options of the methods with a trained A = down [r, K] and B = up [N, r].

    r: rank.  alpha: the branch is scaled by alpha / r, or alpha / sqrt(r) with use_rslora.
    dropout: of x on the branch, in training.  activation: phi between A and B, the paper's MPC_n.
    """

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    use_rslora: bool = False
    activation: str = "identity"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


Made = TypeVar("Made", bound=type[Method])


@dataclass_transform(kw_only_default=True, frozen_default=True)
def method(name: str) -> Callable[[Made], Made]:
    """Class decorator: a frozen keyword-only dataclass, entered in the registry under ``name``."""

    def register(cls: Made) -> Made:
        if name in METHODS:
            raise TypeError(f"two methods are named {name!r}")
        made: Any = dataclass(frozen=True, kw_only=True)(cls)
        made.name = name
        made.peft_form = cls.__dict__.get("peft_form")  # a method made from another one is another
        if made.peft_form is not None:
            made.peft = str(made.peft_form)
        generated = made.__init__

        def __init__(self: Any, *values: Any, **options: Any) -> None:
            if values:
                raise TypeError(
                    f"{made.__name__} takes its options by name, as in {made.__name__}(r=8), "
                    f"got {values[0]!r} without one"
                )
            known = {field.name for field in fields(made)}
            for alias, option in {**ALIASES, **made.aliases}.items():
                if alias in options and option in known:
                    if option in options:
                        raise TypeError(f"{alias} is {option}: give one of them, not both")
                    options[option] = options.pop(alias)
            unknown = sorted(set(options) - known)
            if unknown:
                raise TypeError(
                    f"{made.__name__} has no option {unknown[0]!r}; its options are "
                    + ", ".join(sorted(known))
                )
            generated(self, **options)

        made.__init__ = __init__
        METHODS[name] = made
        return made

    return register


def _check_type(what: str, value: Any, hint: Any) -> None:
    """Plain options (int, float, bool, str, or None where allowed) are checked, others passed."""
    allowed = get_args(hint) or (hint,)
    if not all(kind in (int, float, bool, str, NoneType) for kind in allowed):
        return
    if type(value) is int and float in allowed and int not in allowed:
        return
    if not any(type(value) is kind for kind in allowed):
        names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
        raise TypeError(f"{what} must be {names}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value}")
