"""VeRA (Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454): train two scales of a shared branch.

    W' = W + diag(l_b) B0 diag(l_d) A0        l_b = up_scale [N] zeros    l_d = core [r] = d_initial
    A0 [r, K_max], B0 [N_max, r]: random, frozen, once for all layers; a layer takes the first
    K columns of A0 and the first N rows of B0

The start is exact.  A0 is frozen, so x is not kept for backward.
"""

import math

import torch
from torch import nn

from decomp_kernels.factors import Factors
from decomp_kernels.methods.base import Adapter, Base, Method, method
from decomp_kernels.peft_form import PeftForm, PeftTensor


@method("vera")
class VeRA(Method):
    """r: width of the shared projections.  d_initial: start of l_d.  projection_prng_key: their
    seed; the same key, r and largest layer give the same projections, here and in PEFT.
    """

    formula = "W + diag(l_b) B0 diag(l_d) A0"
    citation = "arXiv:2310.11454"
    trains = "N + r"
    peft_form = PeftForm(
        "VeraConfig",
        "VERA",
        tensors={
            "core": PeftTensor("vera_lambda_d.*"),
            "up_scale": PeftTensor("vera_lambda_b.*"),
            "shared_down": PeftTensor("vera_A.*", shared=True),
            "shared_up": PeftTensor("vera_B.*", shared=True),
        },
        options={
            "r": "r",
            "d_initial": "d_initial",
            "dropout": "vera_dropout",
            "projection_prng_key": "projection_prng_key",
        },
        bias_only="vera_only",
        conv1d=True,
    )
    aliases = {"vera_dropout": "dropout"}

    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_prng_key: int = 0

    def share(
        self, layers: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Parameter]:
        rows, cols = max(N for N, _ in layers), max(K for _, K in layers)
        # Drawn on the CPU in float32, so that the key means the same numbers on every device.
        generator = torch.Generator("cpu").manual_seed(self.projection_prng_key)
        made = {}
        for name, shape in (("shared_down", (self.r, cols)), ("shared_up", (rows, self.r))):
            if device.type == "meta":
                values = torch.empty(shape, dtype=dtype, device=device)
            else:
                bound = math.sqrt(6 / shape[1])  # Kaiming, uniform, for a relu
                values = torch.empty(shape, dtype=torch.float32)
                values = values.uniform_(-bound, bound, generator=generator).to(device, dtype)
            made[name] = nn.Parameter(values, requires_grad=False)
        return made

    def create(self, adapter: Adapter, base: Base) -> None:
        shared = base.shared
        if not shared:
            shape = (base.out_features, base.in_features)
            shared = self.share([shape], base.dtype, base.weight.device)
        adapter.shared_down, adapter.shared_up = shared["shared_down"], shared["shared_up"]
        adapter.core = base.scales(self.r, fill=self.d_initial)
        adapter.up_scale = base.scales(base.out_features, fill=0.0)

    def lower(self, adapter: Adapter, base: Base) -> Factors:
        up = adapter.shared_up[: base.out_features]
        return Factors(
            down=adapter.shared_down[:, : base.in_features],
            up=(adapter.up_scale[:, None] * up).to(up.dtype),
            core=adapter.core,
        )
