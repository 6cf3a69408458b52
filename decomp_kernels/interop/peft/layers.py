"""PEFT's layers, method by method: their options as ours, and the classes put on them.

The classes have names here, made when they are first asked for, so that pickle finds them:
``LoraLinear`` is ``class LoraLinear(Lora, peft.tuners.lora.layer.Linear)``.
"""

from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from decomp_kernels.interop.peft.accelerated import (
    Accelerated,
    PeftForward,
    Plan,
    class_name,
    live,
    scale_of,
)
from decomp_kernels.methods.adalora import AdaLoRA
from decomp_kernels.methods.base import Method
from decomp_kernels.methods.boft import BOFT
from decomp_kernels.methods.dora import DoRA
from decomp_kernels.methods.hira import HiRA
from decomp_kernels.methods.hra import HRA
from decomp_kernels.methods.ia3 import IA3
from decomp_kernels.methods.loha import LARGEST_BRANCH, LoHa
from decomp_kernels.methods.lokr import LoKr
from decomp_kernels.methods.lora import LoRA
from decomp_kernels.methods.oft import OFT
from decomp_kernels.methods.sparse import Sparse
from decomp_kernels.methods.ssl import SSL
from decomp_kernels.methods.vera import VeRA
from decomp_kernels.ops.autocast import autocast_dtype

NORMS = ("weight_sq", "weight_seen", "kept_norm")  # what DoRA keeps on its adapter


class Lora(Accelerated):
    container = "lora_A"
    dropout = "lora_dropout"

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        r = layer.r[adapter]
        options = {"r": r, "alpha": scale_of(layer.scaling[adapter]) * r}
        dropout = self.live_dropout(adapter)
        biased = layer.lora_B[adapter].bias is not None
        variant = layer.lora_variant.get(adapter)
        if variant is None:
            return live(LoRA, dropout=dropout, lora_bias=biased, **options)
        if type(variant) is not DoraLinearVariant:
            raise PeftForward(f"its variant is {class_name(variant)}")
        if biased:
            raise PeftForward("DoRA with a bias on B")
        assert DoRA.peft_form is not None
        dropout = dropout if self.training else 0.0
        return live(DoRA, dropout=dropout, **options, **DoRA.peft_form.ours)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        if not isinstance(plan.method, DoRA):
            return super()._run(plan, x)
        view, norms, nothing = plan.view, self.fused.norms, (None, None, None)
        # A compiled forward cannot see that the weight has changed since an eager one.
        compiling = torch.compiler.is_compiling()
        kept = nothing if compiling else norms.get(plan.adapter, nothing)
        for name, value in zip(NORMS, kept, strict=True):
            setattr(view, name, value)
        y = super()._run(plan, x)
        if not compiling:
            norms[plan.adapter] = tuple(getattr(view, name) for name in NORMS)
        return y

    # What may change the base weight.  A start such as PiSSA's takes its part out through .data.

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self.fused.norms.clear()
        super().update_layer(*args, **kwargs)  # type: ignore[misc]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.fused.norms.clear()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        self.fused.norms.clear()
        super().unmerge()  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.fused.norms.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fused.norms.clear()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


class AdaLora(Accelerated):
    container = "lora_A"
    dropout = "lora_dropout"

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        if layer.lora_A[adapter].shape[0] == 0:
            raise PeftForward("its rank is 0")
        r = layer.r[adapter]
        alpha = scale_of(layer.scaling[adapter]) * (r + 1e-5)  # of scale = alpha / (r + 1e-5)
        return live(AdaLoRA, r=r, alpha=alpha, dropout=self.live_dropout(adapter))

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        layer, view = self, plan.view
        ranknum: Any = layer.ranknum[plan.adapter]  # type: ignore[attr-defined]
        view.core = view.core / (ranknum + 1e-5)  # a tensor, which PEFT lets train
        return super()._run(plan, x)


class AdaLora8bit(AdaLora):
    widens = True


class Ia3(Accelerated):
    container = "ia3_l"

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        return live(SSL) if layer.is_feedforward else live(IA3, scale_bias=True)


class Ia3Bnb(Ia3):
    widens = True

    def check_precision(self, plan: Plan, x: Tensor) -> None:
        if plan.base.weight.format == "int8" and x.dtype.itemsize < 4:  # type: ignore[union-attr]
            raise PeftForward("PEFT computes it in float32")


class Oft(Accelerated):
    container = "oft_R"
    keeps_dtype = True

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        rotation = layer.oft_R[adapter]
        if rotation.use_cayley_neumann and rotation.num_cayley_neumann_terms < 2:
            raise PeftForward("num_cayley_neumann_terms is below 2")
        names = ("block_size", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
        options = {name: getattr(rotation, name) for name in (*names, "coft", "eps")}
        return live(OFT, **options)


class Boft(Accelerated):
    container = "boft_R"
    dropout = "boft_dropout"
    keeps_dtype = True

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        if self.live_dropout(adapter):
            raise PeftForward("boft_dropout in training")
        if layer.boft_R[adapter].shape[0] != 1:
            raise PeftForward("more than one butterfly factor")
        return live(BOFT, block_size=layer.boft_block_size[adapter])

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        plan.view.permutations = None  # as for one factor
        return super()._run(plan, x)


class Hra(Accelerated):
    container = "hra_u"
    keeps_dtype = True
    quantized = False  # PEFT takes the codes for weights

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        columns, r = layer.hra_u[adapter].shape
        if layer.hra_apply_GS[adapter] and r > columns:  # no orthonormal basis: PEFT's is rounding
            raise PeftForward("more reflections than in_features")
        return live(HRA, r=layer.hra_r[adapter], apply_GS=layer.hra_apply_GS[adapter])


class Vera(Accelerated):
    container = "vera_lambda_d"
    dropout = "vera_dropout"
    keeps_dtype = True

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        return live(VeRA, r=layer.r[adapter], dropout=self.live_dropout(adapter))


class Lycoris(Accelerated):
    method: type[Method]
    keeps_dtype = True

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        for kind in ("rank_dropout", "module_dropout"):
            if self.training and getattr(layer, kind)[adapter]:
                raise PeftForward(f"{kind} in training")
        r = layer.r[adapter]
        return live(self.method, r=r, alpha=scale_of(layer.scaling[adapter]) * r)


class Loha(Lycoris):
    container = "hada_w1_a"
    method = LoHa

    def check_precision(self, plan: Plan, x: Tensor) -> None:
        if plan.method.r**2 > LARGEST_BRANCH:  # type: ignore[attr-defined]
            check_map(plan.view.up1, x)


class Lokr(Lycoris):
    container = "scaling"  # its tensors are of several kinds
    method = LoKr


class Hira(Accelerated):
    container = "hira_A"
    dropout = "hira_dropout"

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        if self.live_dropout(adapter):
            raise PeftForward("hira_dropout in training")
        return live(HiRA, r=layer.r[adapter])

    def check_precision(self, plan: Plan, x: Tensor) -> None:
        check_map(plan.view.up, x)


def check_map(factor: Tensor, x: Tensor) -> None:
    """A weight map's gradients go through x^T dy, in x's dtype here and in the factors' in PEFT."""
    if torch.is_grad_enabled() and factor.dtype != x.dtype and autocast_dtype(x) is None:
        raise PeftForward(f"gradients of {factor.dtype} through a product in {x.dtype}")


class Shira(Accelerated):
    container = "shira_weight"

    def method_of(self, adapter: str) -> Method:
        layer: Any = self
        if layer.scaling[adapter] != 1.0:
            raise PeftForward("its scale is not 1")
        return live(Sparse)

    def _run(self, plan: Plan, x: Tensor) -> Tensor:
        view = plan.view
        view.rows, view.cols = view.rows.long(), view.cols.long()  # PEFT's are int32
        return super()._run(plan, x)


CLASSES: dict[str, tuple[type[Accelerated], str]] = {
    "LoraLinear": (Lora, "peft.tuners.lora.layer.Linear"),
    "LoraLinear4bit": (Lora, "peft.tuners.lora.bnb.Linear4bit"),
    "LoraLinear8bit": (Lora, "peft.tuners.lora.bnb.Linear8bitLt"),
    "LoraTorchao": (Lora, "peft.tuners.lora.torchao.TorchaoLoraLinear"),
    "AdaLoraLinear": (AdaLora, "peft.tuners.adalora.layer.SVDLinear"),
    "AdaLoraLinear4bit": (AdaLora, "peft.tuners.adalora.bnb.SVDLinear4bit"),
    "AdaLoraLinear8bit": (AdaLora8bit, "peft.tuners.adalora.bnb.SVDLinear8bitLt"),
    "Ia3Linear": (Ia3, "peft.tuners.ia3.layer.Linear"),
    "Ia3Linear4bit": (Ia3Bnb, "peft.tuners.ia3.bnb.Linear4bit"),
    "Ia3Linear8bit": (Ia3Bnb, "peft.tuners.ia3.bnb.Linear8bitLt"),
    "HiraLinear": (Hira, "peft.tuners.hira.layer.Linear"),
    "HiraLinear4bit": (Hira, "peft.tuners.hira.bnb.Linear4bit"),
    "HiraLinear8bit": (Hira, "peft.tuners.hira.bnb.Linear8bitLt"),
    "OftLinear": (Oft, "peft.tuners.oft.layer.Linear"),
    "BoftLinear": (Boft, "peft.tuners.boft.layer.Linear"),
    "HraLinear": (Hra, "peft.tuners.hra.layer.HRALinear"),
    "VeraLinear": (Vera, "peft.tuners.vera.layer.Linear"),
    "LohaLinear": (Loha, "peft.tuners.loha.layer.Linear"),
    "LokrLinear": (Lokr, "peft.tuners.lokr.layer.Linear"),
    "ShiraLinear": (Shira, "peft.tuners.shira.layer.Linear"),
}


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, path = CLASSES[name]
    module, _, theirs = path.rpartition(".")
    cls = type(name, (mixin, getattr(import_module(module), theirs)), {"__module__": __name__})
    globals()[name] = cls
    return cls


def accelerated_class(layer: nn.Module) -> type | None:
    """The class that accelerates exactly this layer's class, None where there is none."""
    named = [name for name, (_, path) in CLASSES.items() if path == class_name(layer)]
    return globals().get(named[0]) or __getattr__(named[0]) if named else None
