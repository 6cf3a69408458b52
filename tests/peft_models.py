"""Small PEFT models for the tests of accelerate: every method, moved away from its start."""

import copy
import warnings

import peft
import torch
from peft import get_peft_model
from torch import nn

from decomp_kernels.ops.dropout import counter_dropout

CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6),
    "lora-dropout": peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.3),
    "rslora": peft.LoraConfig(r=4, use_rslora=True),
    "lora-bias": peft.LoraConfig(r=4, lora_bias=True),
    "lora-trained-bias": peft.LoraConfig(r=4, bias="lora_only"),  # the base's own
    "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa"),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "dora-dropout": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=0.3),
    "ia3": peft.IA3Config(feedforward_modules=["second"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_alpha=6),
    "adalora-dropout": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_dropout=0.3),
    "oft": peft.OFTConfig(oft_block_size=4),
    "oft-exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "oft-shared": peft.OFTConfig(oft_block_size=4, block_share=True),
    "coft": peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, block_share=True),
    "boft": peft.BOFTConfig(boft_block_size=4),
    "hra": peft.HRAConfig(r=4),
    "hra-gs": peft.HRAConfig(r=4, apply_GS=True),
    "vera": peft.VeraConfig(r=4),
    "vera-dropout": peft.VeraConfig(r=4, vera_dropout=0.3),
    "loha": peft.LoHaConfig(r=4, alpha=6),  # PEFT holds alpha / r in float32
    "loha-9": peft.LoHaConfig(r=9, alpha=18),
    "lokr": peft.LoKrConfig(r=2, alpha=6),
    "lokr-both": peft.LoKrConfig(r=1, alpha=6, decompose_both=True),
    "hira": peft.HiraConfig(r=4),
    "shira": peft.ShiraConfig(r=2),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 16)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 16)

    def forward(self, x):
        return self.first(x)


def configuration(name, targets):
    made = copy.deepcopy(CONFIGS[name])
    made.target_modules = targets
    return made


def moved(model, seed=1):
    """Every trained parameter away from its start, the same way for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
    return model


def peft_model(name, dtype=torch.float32, base=None, targets=("first", "second")):
    torch.manual_seed(0)
    base = Model() if base is None else base
    made_in = torch.float32 if dtype == torch.float64 else dtype  # PiSSA starts in no other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BOFT's missing CUDA extension; a bias that cannot merge
        model = get_peft_model(base.to(made_in), configuration(name, list(targets)))
    return moved(model.double() if dtype == torch.float64 else model)


class SameMask(nn.Module):
    """A dropout that draws our mask, so that a stock PEFT layer drops the same elements."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return counter_dropout(x, self.p) if self.training else x


def with_our_masks(model):
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, SameMask(child.p).train(child.training))
    return model


def outcome(model, x, dy):
    """{"y", "x", every trained parameter}: the output, and the gradients under ``dy``."""
    torch.manual_seed(7)  # of the masks
    x = x.detach().clone().requires_grad_()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    grads = torch.autograd.grad(y, [x, *named.values()], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *named), grads, strict=True))}


def accelerated_layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "fused")}


def calls(model):
    """What each accelerated layer counted: {reason: count}, layer by layer."""
    return [dict(layer.fused.calls) for layer in accelerated_layers(model).values()]
