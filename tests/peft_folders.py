"""Shared by the tests of PEFT's files: a small base, every method with its PEFT configuration."""

import json
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

import decomp_kernels as dk
from decomp_kernels.linear import adapted_layers
from decomp_kernels.methods.lora_dash import select_directions

M = dk.methods()


class Block(nn.Module):
    """Two linears of different shapes, one without bias, a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.block = Block()
        self.other = Block()
        self.head = nn.Linear(32, 5)
        self.to(dtype).eval()

    def forward(self, x):
        return self.head(self.other(self.block(x)))


class Case(NamedTuple):
    """A method of ours on Net, and PEFT's configuration of the same, written by hand."""

    method: Any
    config: str
    fields: dict[str, Any]
    options: dict[str, Any] = {}


TARGETS = ["block.up", "block.down", "other.down"]
BOTH = {"r": 4, "lora_alpha": 6}
CASES = {
    "lora": Case(M["lora"](**BOTH), "LoraConfig", BOTH),
    "rslora": Case(
        M["lora"](**BOTH, use_rslora=True), "LoraConfig", {**BOTH, "use_rslora": True}
    ),
    "lora_bias": Case(M["lora"](**BOTH, lora_bias=True), "LoraConfig", {**BOTH, "lora_bias": True}),
    "patterns": Case(
        M["lora"](**BOTH),
        "LoraConfig",
        {**BOTH, "rank_pattern": {"down": 2}, "alpha_pattern": {"block.up": 3}},
        {"rank_pattern": {"down": 2}, "alpha_pattern": {"block.up": 3}},
    ),
    "biases": Case(
        M["lora"](**BOTH), "LoraConfig", {**BOTH, "bias": "lora_only"}, {"bias": "lora_only"}
    ),
    "all biases": Case(M["lora"](**BOTH), "LoraConfig", {**BOTH, "bias": "all"}, {"bias": "all"}),
    "head": Case(
        M["lora"](**BOTH),
        "LoraConfig",
        {**BOTH, "modules_to_save": ["head", "other.norm"]},
        {"modules_to_save": ["head", "other.norm"]},
    ),
    "dora": Case(M["dora"](**BOTH), "LoraConfig", {**BOTH, "use_dora": True}),
    "adalora": Case(
        M["adalora"](init_r=4, target_r=2, lora_alpha=6),
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 9},
    ),
    "ia3": Case(M["ia3"](scale_bias=True), "IA3Config", {"feedforward_modules": []}),
    "ssl": Case(M["ssl"](), "IA3Config", {"feedforward_modules": TARGETS}),
    "oft": Case(
        M["oft"](block_size=8), "OFTConfig", {"oft_block_size": 8}, {"bias": "lora_only"}
    ),
    "oft, default": Case(M["oft"](), "OFTConfig", {}),
    "oft, r": Case(
        M["oft"](r=4, use_cayley_neumann=False),
        "OFTConfig",
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
    ),
    "oft, shared": Case(
        M["oft"](block_size=4, block_share=True),
        "OFTConfig",
        {"oft_block_size": 4, "block_share": True},
    ),
    "boft": Case(M["boft"](), "BOFTConfig", {}),
    "boft, number": Case(
        M["boft"](block_num=8), "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 8}
    ),
    "hra": Case(M["hra"](r=4), "HRAConfig", {"r": 4}),
    "hra, gs": Case(M["hra"](r=3, apply_GS=True), "HRAConfig", {"r": 3, "apply_GS": True}),
    "vera": Case(
        M["vera"](r=6, projection_prng_key=3, d_initial=0.2),
        "VeraConfig",
        {"r": 6, "projection_prng_key": 3, "d_initial": 0.2},
    ),
    "loha": Case(M["loha"](r=3, alpha=6), "LoHaConfig", {"r": 3, "alpha": 6}),
    "lokr": Case(M["lokr"](r=2, alpha=6), "LoKrConfig", {"r": 2, "alpha": 6}),
    "lokr, both": Case(
        M["lokr"](r=1, decompose_both=True, decompose_factor=4),
        "LoKrConfig",
        {"r": 1, "decompose_both": True, "decompose_factor": 4},
    ),
    "hira": Case(M["hira"](r=4), "HiraConfig", {"r": 4}),
    "sparse": Case(M["sparse"](r=4), "ShiraConfig", {"r": 4}),
}  # fmt: skip


def ours(case, dtype=torch.float64):
    """Net with the case's adapter, moved away from its start."""
    model = dk.adapt(Net(dtype), case.method, TARGETS, **case.options)
    return moved(model)


def theirs(case, dtype=torch.float64):
    """PEFT's model of the same, moved away from its start."""
    import peft

    fields = dict(case.fields)
    if case.options.get("bias") and "bias" not in fields:
        fields["bias"] = f"{case.config.removesuffix('Config').lower()}_only"
    config = getattr(peft, case.config)(target_modules=TARGETS, **fields)
    return moved(peft.get_peft_model(Net(dtype), config))


@torch.no_grad()
def moved(model, size=0.2):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:  # AdaLoRA's is no weight, nor saved
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise).to(parameter.dtype))
    if any(hasattr(module, "selected") for module in model.modules()):
        select_directions(model)
    return model.eval()


def inputs(dtype=torch.float64):
    return torch.randn(7, 32, generator=torch.Generator().manual_seed(5), dtype=dtype)


def state(model):
    """Every tensor of the adapter and every trained one of a model of ours."""
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for path, layer in adapted_layers(model).items():
        for name, adapter in layer.adapters.items():
            found |= {f"{path}.{name}.{key}": t for key, t in adapter.state_dict().items()}
    return found


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")
