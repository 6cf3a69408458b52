"""axolotl's and unsloth's functions get their arguments in order, from packages played here."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import decomp_kernels as dk
from decomp_kernels.bench import peers_gpu
from decomp_kernels.bench.contenders import Contenders, leave_the_start
from decomp_kernels.testing import relative_error

M, K, N = 6, 16, 24
HEAD = """
import torch
def plain(x, W, b, A, B, s):
    assert x.dim() == 3 and type(s) is float
    y = x @ W.t() + s * (x @ A.t()) @ B.t()
    return y if b is None else y + b
"""
PLAYED = {
    "axolotl/__init__.py": "",
    "axolotl/kernels/__init__.py": "",
    "axolotl/kernels/lora.py": HEAD
    + """
class LoRA_O:
    @staticmethod
    def apply(X, X_drop, W, b, W_quant, A, B, s, lora_bias, magnitude):
        assert W_quant is None and lora_bias is None
        if X_drop is not None:
            return X @ W.t() + s * (X_drop @ A.t()) @ B.t()
        y = plain(X, W, None if magnitude is not None else b, A, B, s)
        if magnitude is not None:
            y = y * magnitude / (W + s * B @ A).norm(dim=1)
            y = y if b is None else y + b
        return y
""",
    "unsloth/__init__.py": "raise RuntimeError('this one changes other libraries')",
    "unsloth/kernels/__init__.py": "",
    "unsloth/kernels/fast_lora.py": HEAD
    + """
class LoRA_W:
    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, s, p=0.0, bias=None): ...
    @staticmethod
    def apply(X, W, W_quant, A, B, s, p=0.0, bias=None):
        assert W_quant is None
        x = torch.nn.functional.dropout(X, p) if p else X
        return plain(X, W, bias, A, B, s) + s * ((x - X) @ A.t()) @ B.t()
""",
}


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] in peers_gpu.NAMES]:
        del sys.modules[name]


@pytest.fixture
def played(tmp_path, monkeypatch):
    for name, text in PLAYED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


def made(name, method, bias=True):
    """(their layer, ours), with the same tensors."""
    linear = nn.Linear(K, N, bias=bias)
    ours = dk.DecomposedLinear(linear, method)
    leave_the_start(ours)
    copy = nn.Linear(K, N, bias=bias)
    copy.load_state_dict(linear.state_dict())
    return peers_gpu.layer(name, copy, ours.adapters["default"], torch.float32), ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("axolotl", dk.LoRA(r=4, alpha=12)),
        ("axolotl", dk.DoRA(r=4, alpha=12)),
        ("unsloth", dk.LoRA(r=4, alpha=12)),
    ],
)
def test_it_computes_what_ours_computes(name, method, bias, played):
    assert peers_gpu.why_not(name, method, bias) is None
    theirs, ours = made(name, method, bias)
    x = torch.randn(M, K, requires_grad=True)
    assert peers_gpu.difference(theirs, ours, x) < 1e-5
    theirs(x).sum().backward()
    got = [p.grad for p in theirs.parameters() if p.requires_grad]
    assert len(got) == (3 if method.name == "dora" else 2)
    assert all(grad is not None for grad in got)
    assert theirs.linear.weight.grad is None
    assert f"{name} of no version, float32 adapters" in peers_gpu.described(name, theirs)


@pytest.mark.parametrize("name", peers_gpu.NAMES)
def test_dropout_is_of_the_branch_alone(name, played):
    theirs, _ = made(name, dk.LoRA(r=4, alpha=12, dropout=0.5), bias=False)
    x = torch.randn(M, K)
    first, second = theirs(x), theirs(x)
    assert not torch.equal(first, second)
    theirs.up.data.zero_()
    assert relative_error(theirs(x), F.linear(x, theirs.linear.weight)) < 1e-6


def test_what_a_package_lacks_is_said(played):
    def why(name, method, bias=False):
        return peers_gpu.why_not(name, method, bias)

    assert why("axolotl", dk.SSB()) == "axolotl has no ssb"
    assert "axolotl's DoRA drops" in why("axolotl", dk.DoRA(dropout=0.1, dropout_mode="peft"))
    assert why("axolotl", dk.DoRA(dropout=0.1)) is None
    assert "unsloth has no dora" in why("unsloth", dk.DoRA())
    source = played / "unsloth" / "kernels" / "fast_lora.py"
    source.write_text(source.read_text().replace("s, p=0.0, bias=None): ...", "s): ..."))
    forget()
    assert "takes no dropout" in why("unsloth", dk.LoRA(dropout=0.1))
    assert "takes no bias" in why("unsloth", dk.LoRA(), bias=True)
    assert why("unsloth", dk.LoRA()) is None
    (played / "axolotl" / "kernels" / "lora.py").write_text("raise RuntimeError('no driver')")
    forget()
    assert why("axolotl", dk.LoRA()) == "axolotl cannot be imported: RuntimeError: no driver"


def contenders(method=None):
    return Contenders(
        method or dk.LoRA(r=4, alpha=12), (M, K, N), torch.float32, torch.float32, False,
        seed=0, device=torch.device("cpu"), others=False,
    )  # fmt: skip


def test_a_layer_s_contenders_take_them_in_with_version_and_reason(played):
    row = contenders()
    for name in peers_gpu.NAMES:
        row._on_gpu(name)
    entries = {entry.contender.name: entry for entry in row.entries}
    assert {"axolotl", "unsloth"} <= set(entries)
    assert entries["axolotl"].path == "axolotl of no version, float32 adapters"
    source = played / "axolotl" / "kernels" / "lora.py"
    source.write_text(source.read_text().replace("s * (x @", "2 * s * (x @"))
    forget()
    row = contenders()
    row._on_gpu("axolotl")
    assert "it computes something else" in row.left_out["axolotl"]


def test_without_the_packages_it_says_so_and_a_cpu_s_rows_do_not_ask():
    row = Contenders(
        dk.LoRA(r=4), (M, K, N), torch.float32, torch.float32, False, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert not set(peers_gpu.NAMES) & {*row.left_out, *(e.contender.name for e in row.entries)}
    for name in peers_gpu.NAMES:
        if name not in sys.modules:
            row._on_gpu(name)
            assert row.left_out[name] == f"{name} is not installed"
