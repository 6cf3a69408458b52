"""DoRA (Liu et al. 2024, arXiv:2402.09353): learn a weight's direction and length apart.

    V = W + s B A       c = m / ||V||_row       W' = diag(c) V       y = c * (x V^T) + b
    A [r, K] uniform as nn.Linear's weight    B [N, r] zeros    m [N] = ||W||_row

The norm is a constant for the gradient (the paper, 4.3) unless norm_grad.  It is found without
B A (ops/row_norm.py), in float32, and m is made by the same code, so the start is exact.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from decomp_kernels import dispatch
from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, LowRank, method
from decomp_kernels.methods.lora import LORA_OPTIONS, LORA_TENSORS
from decomp_kernels.ops.dropout import counter_dropout, draw_seed
from decomp_kernels.ops.row_norm import row_norm, squared_rows
from decomp_kernels.peft_form import PeftForm, PeftTensor
from decomp_kernels.quantized_weight import QuantizedWeight
from decomp_kernels.sharding import is_sharded

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


@method("dora")
class DoRA(LowRank):
    """norm_grad: let the norm have a gradient.  cache_norm: keep it until the next optimizer step;
    None: where the base is quantised, for there each norm dequantises it.

    dropout_mode: "branch" drops x on the low-rank branch, one base GEMM; "peft" drops it in the
    base product of the magnitude's share too, y = x W^T + (c - 1) x~ W^T + c s x~ A^T B^T + b
    = c (x W^T + s x~ A^T B^T) + (1 - c) (x - x~) W^T + b, two base GEMMs.

    norm_dtype: "float32", or "match" to round the norm to the adapter's dtype as PEFT does, for
    magnitudes that were trained so.
    """

    formula = "diag(m / ||V||) V,  V = W + s B A"
    citation = "arXiv:2402.09353"
    trains = "r (N + K) + N"
    peft_form = PeftForm(
        "LoraConfig",
        "LORA",
        tensors=LORA_TENSORS
        | {
            "magnitude": PeftTensor(
                "lora_magnitude_vector.*.weight", in_file="lora_magnitude_vector"
            )
        },
        options=LORA_OPTIONS,
        fixed={"use_dora": True, "lora_bias": False},
        ours={
            "dropout_mode": "peft",
            "norm_dtype": "match",
            "norm_grad": False,
            "cache_norm": False,
        },
        per_layer=("r", "alpha"),
        bias_only="lora_only",
        conv1d=True,
    )

    norm_grad: bool = False
    cache_norm: bool | None = None
    dropout_mode: str = "branch"
    norm_dtype: str = "float32"

    def check_options(self) -> None:
        super().check_options()
        for option, allowed in (
            ("dropout_mode", ("branch", "peft")),
            ("norm_dtype", ("float32", "match")),
        ):
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"{option} must be one of {', '.join(allowed)}, got {getattr(self, option)!r}"
                )
        if self.cache_norm and self.norm_grad:
            raise ValueError("cache_norm keeps a constant: it cannot be used with norm_grad=True")
        if self.activation != "identity" and self.dropout_mode == "peft":
            raise ValueError('dropout_mode="peft" is for activation="identity"')

    def create(self, adapter: Adapter, base: Base) -> None:
        adapter.down = base.kaiming(self.r, base.in_features)
        adapter.up = base.matrix(base.out_features, self.r)
        adapter.register_buffer("weight_sq", squared_rows(base.weight), persistent=False)
        adapter.weight_seen = _identity(base.weight)
        adapter.kept_norm = None
        # On the CPU or on meta a named Triton form cannot run yet.  With B = 0 the norm is that of
        # W, the same bits by every implementation, so the start stays exact.
        impl = dispatch.named(self.impl)
        able = impl == "auto" or isinstance(base.weight, QuantizedWeight)
        able = able or dispatch.why_not(base.weight, impl) is None  # type: ignore[arg-type]
        made = self if able else replace(self, impl="aten")
        adapter.magnitude = nn.Parameter(made._norm_now(adapter, base).detach().clone())

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        return Factors(
            down=adapter.down,
            up=adapter.up,
            scale=self.scale,
            out_scale=adapter.magnitude / self.norm(adapter, base),
            activation=self.activation,
        )

    def forward(self, adapter: Adapter, base: Base, x: Tensor, training: bool) -> Tensor:
        if not (training and self.dropout > 0.0 and self.dropout_mode == "peft"):
            return super().forward(adapter, base, x, training)
        seed = draw_seed(x)
        factors = self.lower(adapter, base)
        assert factors.out_scale is not None
        dropped = self.apply(factors, base, x, self.dropout, seed)
        # x - x~ is rounded in x's dtype, and weighs little while c is near 1.
        rest = Factors(out_scale=1 - factors.out_scale)
        missing = x - counter_dropout(x, self.dropout, seed)
        return dropped + self.apply(rest, base._replace(bias=None), missing)

    def norm(self, adapter: Adapter, base: Base) -> Tensor:
        """||V_j||, [N], float32 or wider, with a gradient only where norm_grad asks for it."""
        if not torch.compiler.is_compiling() and adapter.weight_seen != _identity(base.weight):
            self.refresh(adapter, base)
        kept = self.cache_norm
        if kept is None:
            kept = isinstance(base.weight, QuantizedWeight) and not self.norm_grad
        # What is traced or recorded once runs many times: there the norm is a part of it.
        recorded = torch.compiler.is_compiling() or dispatch.recording(base.weight.device)
        if not kept or recorded:
            return self._norm_now(adapter, base)
        tensors = (base.weight, adapter.down, adapter.up)
        state = (_optimizer_steps, self.scale, *map(_identity, tensors))
        if adapter.kept_norm is None or adapter.kept_norm[0] != state:
            # A tensor made in inference mode cannot be in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                adapter.kept_norm = (state, self._norm_now(adapter, base))
        return adapter.kept_norm[1]

    def refresh(self, adapter: Adapter, base: Base) -> None:
        # Of a weight in shards nothing is known before a forward has it whole.
        sharded = is_sharded(base.weight)
        adapter.weight_sq = None if sharded else squared_rows(base.weight.detach())
        adapter.weight_seen = None if sharded else _identity(base.weight)
        adapter.kept_norm = None

    def _norm_now(self, adapter: Adapter, base: Base) -> Tensor:
        down, up = adapter.down, adapter.up
        if not self.norm_grad:
            down, up = down.detach(), up.detach()
        norm = row_norm(
            base.weight, down, up, self.scale, weight_sq=adapter.weight_sq, impl=self.impl
        )
        if self.norm_dtype == "match":
            norm = norm.to(adapter.down.dtype).to(norm.dtype)
        return norm


def _identity(tensor: Tensor | QuantizedWeight) -> tuple[int, int, torch.dtype]:
    """Changes with the values, by in-place work or by new storage.

    Not with in-place work on ``tensor.data``, which torch does not count: after that, say so with
    ``layer.load_state_dict(layer.state_dict())``.
    """
    if isinstance(tensor, QuantizedWeight):
        tensor = tensor.codes  # scales do not change without them
    version = 0 if tensor.is_inference() else tensor._version  # torch counts none of those
    return tensor.data_ptr(), version, tensor.dtype
