"""The operator through its Triton forms against float64; where they are refused; inspect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_decomposed_linear import (
    NAMES,
    OPTIONAL,
    check_against_formula,
    formula,
    make,
    outcome,
    term_sets,
)
from torch import nn
from triton_checks import DTYPES

import decomp_kernels as dk
from decomp_kernels import dispatch
from decomp_kernels.cli import inspect
from decomp_kernels.cli.inspect import KERNELS, LIMITS
from decomp_kernels.cli.main import main
from decomp_kernels.factors import ACTIVATIONS
from decomp_kernels.ops.decomposed_linear import bwd, decomposed_linear, fwd
from decomp_kernels.ops.kron import kron_linear
from decomp_kernels.ops.row_norm import bwd as norm_bwd
from decomp_kernels.ops.row_norm import fwd as norm_fwd
from decomp_kernels.ops.row_norm import row_norm, squared_rows
from decomp_kernels.reference.dropout import keep_mask, kept_fraction
from decomp_kernels.testing import assert_as_good_as, relative_error

ROOT = Path(__file__).parent.parent
dtypes = pytest.mark.parametrize("dtype", DTYPES)
forms = pytest.mark.parametrize("impl", dispatch.TRITON_FORMS)


# Fused kernels are tried in every dtype and rank by test_triton_fused.py.
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [*(("triton:passes", d) for d in DTYPES), ("triton:fused", "fp32"), ("triton:fused", "bf16")],
)
def test_every_combination_of_terms(impl, dtype):
    for terms in term_sets():
        check_against_formula(make(terms, dtype), impl)


@forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(impl, activation):
    for dtype in ("fp32", "bf16-fp32"):
        check_against_formula(make(OPTIONAL, dtype), impl, activation=activation)


@pytest.mark.parametrize(
    ("impl", "r"),
    [*(("triton:passes", r) for r in (1, 3, 24, 200)), ("triton:fused", 3), ("triton:fused", 24)],
)
@pytest.mark.parametrize("shape", [(1,), (), (2, 1, 7), (0,), (70,)], ids=str)
def test_odd_shapes_and_ranks(impl, shape, r):
    for dtype in ("fp32", "bf16-fp32"):
        check_against_formula(make(OPTIONAL, dtype, shape, K=67, N=45, r=r), impl)


@forms
@dtypes
@pytest.mark.parametrize("terms", [["branch"], OPTIONAL], ids=["lora", "all"])
def test_dropout_is_the_defined_mask_on_the_branch(impl, terms, dtype):
    for K in (33, 36):
        tensors = make(terms, dtype, (6, 7), K=K)
        seed, p = torch.tensor(-987654321), 0.3
        kept = keep_mask(seed, (42, K), p).view(6, 7, K).double() / kept_fraction(p)
        check_against_formula(tensors, impl, dropout=p, seed=seed, kept=kept)


@forms
@pytest.mark.parametrize("K", [30, 32])
def test_masks_of_forward_and_backward_are_those_of_aten(impl, K):
    seed, p = torch.tensor(12345), 0.4
    found = {}
    for each in ("aten", impl):
        x = torch.ones(19, K, requires_grad=True)
        eye = torch.eye(K, requires_grad=True)
        zero = torch.zeros(K, K)
        y = decomposed_linear(x, zero, down=eye, up=eye, dropout=p, seed=seed, impl=each)
        ones = torch.ones(1, K).requires_grad_()
        through_dx = decomposed_linear(
            x, torch.zeros(1, K), down=ones, up=torch.ones(1, 1), dropout=p, seed=seed, impl=each
        )
        through_dA = torch.autograd.grad(y.sum(), eye, retain_graph=True)[0]
        d_x = torch.autograd.grad(through_dx.sum(), x)[0]
        found[each] = (y, d_x, through_dA)
    kept = keep_mask(seed, (19, K), p)
    for one, other in zip(found["aten"], found[impl], strict=True):
        torch.testing.assert_close(one, other)
    y, d_x, _ = found[impl]
    assert torch.equal(y != 0, kept)
    assert torch.equal(d_x != 0, kept)


@forms
def test_only_what_is_asked_for_is_computed(impl):
    for asked in (["x"], ["up"], ["down", "core"], ["out_scale"], ["in_scale"], ["bias", "x"]):
        tensors = make(OPTIONAL, "fp32")
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in asked)
        decomposed_linear(**tensors, scale=0.7, impl=impl).sum().backward()
        exact = {k: v.detach().double().requires_grad_(k in asked) for k, v in tensors.items()}
        formula(exact, 0.7, "identity").sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == (name in asked), name
            if name in asked:
                assert relative_error(tensor.grad, exact[name].grad) < 2e-6, name


@forms
def test_same_inputs_same_bits(impl):
    tensors = make(OPTIONAL, "bf16-fp32", (65,), K=200, N=150)
    seed = torch.tensor(5)
    dy = torch.randn(65, 150).bfloat16()

    def call(t):
        return decomposed_linear(**t, dropout=0.1, seed=seed, impl=impl)

    first, second = outcome(call, tensors, dy), outcome(call, tensors, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


@forms
def test_float32_adapters_on_a_bf16_base_keep_float32_precision(impl):
    tensors = make(["branch"], "bf16-fp32", (40,), K=64, N=48, r=8)
    exact = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
    dy = torch.randn(40, 48).bfloat16()
    ours = outcome(lambda t: decomposed_linear(**t, scale=0.7, impl=impl), tensors, dy)
    truth = outcome(lambda t: formula(t, 0.7, "identity"), exact, dy.double())
    for name in ("down", "up"):
        assert relative_error(ours[name], truth[name]) < 2e-6, name


@forms
def test_registration(impl):
    for terms in ([], OPTIONAL):
        t = {k: v.detach() for k, v in make(terms, "bf16-fp32").items()}
        options = (torch.tensor(3), 0.5, 0.25, "gelu")
        keep = ["branch" in terms, "out_scale" in terms]
        shared = (t["weight"], None, "dense", *(t.get(n) for n in NAMES[2:8]))
        args = (t["x"], *shared, t.get("addend"), *options, keep, impl)
        torch.library.opcheck(fwd, args)
        y, h, z = fwd(*args)
        needs = [name in t for name in NAMES]
        needs[-1] = "out_scale" in t and "addend" in t
        given = (h if keep[0] else None, z if keep[1] else None)
        torch.library.opcheck(bwd, (y, t["x"], *shared, *given, *options, needs, impl))
    weight, down, up = torch.randn(9, 12).bfloat16(), torch.randn(3, 12), torch.randn(9, 3)
    squared = squared_rows(weight)
    torch.library.opcheck(norm_fwd, (weight, squared, down, up, 0.7, impl))
    norm = norm_fwd(weight, squared, down, up, 0.7, impl)
    torch.library.opcheck(norm_bwd, (norm, norm, weight, down, up, 0.7, impl))


def test_row_norm_differentiates():
    weight = torch.randn(37, 53)
    down, up = torch.randn(5, 53, requires_grad=True), torch.randn(37, 5, requires_grad=True)
    found = {}
    for impl in ("aten", "triton:passes"):
        norm = row_norm(weight, down, up, 0.7, impl=impl)
        found[impl] = (norm, *torch.autograd.grad(norm.sum(), (down, up)))
    for one, other in zip(found["aten"], found["triton:passes"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    start = row_norm(weight, down, torch.zeros_like(up), 0.7, impl="triton:passes")
    assert torch.equal(start, squared_rows(weight).sqrt())


@forms
@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "ssb", "ia3", "parallel_adapter", "hira", "loha", "boft", "svdiff", "sparse"],
)
def test_a_layer_trains_through_it(impl, name):
    torch.manual_seed(0)
    method = dk.methods()[name]
    linear, x = nn.Linear(20, 14), torch.randn(9, 20)
    grads, outputs = [], []
    for each in ("aten", impl):
        torch.manual_seed(1)
        layer = dk.DecomposedLinear(linear, method(impl=each))
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        y = layer(x)
        y.square().sum().backward()
        outputs.append(y)
        grads.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert_as_good_as(outputs[1], outputs[0], outputs[0], name)
    assert grads[0]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@forms
def test_the_environment_variable_chooses_it(impl, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, impl)
    assert dispatch.choose(torch.ones(1), has=dispatch.IMPLS) == impl
    monkeypatch.delenv(dispatch.VARIABLE)
    assert dispatch.choose(torch.ones(1), has=dispatch.IMPLS) == "aten"


@forms
def test_where_it_cannot_run_it_says_why_and_does_not_fall_back(impl, monkeypatch):
    with torch.device("cpu"):
        tensors = make(["branch"], "fp32")
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, and x is float64"):
        decomposed_linear(**make(["branch"], "fp64"), impl=impl)
    with pytest.raises(RuntimeError, match="no such implementation yet; use impl='aten'"):
        kron_linear(torch.ones(2, 4), torch.ones(3, 2), torch.ones(3, 2), impl=impl)
    with pytest.raises(RuntimeError, match="x is on meta"):
        dispatch.choose(torch.ones(1, device="meta"), impl, has=dispatch.IMPLS)
    monkeypatch.setenv(dispatch.INTERPRET, "0")
    with pytest.raises(RuntimeError, match="x is on the CPU, where Triton runs only as an"):
        decomposed_linear(**tensors, impl=impl)
    monkeypatch.setattr(dispatch, "why_not_installed", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run: triton is not inst"):
        row_norm(tensors["weight"], tensors["down"], tensors["up"], impl=impl)


INSPECT = """
import json
from decomp_kernels.cli.inspect import inspect
import triton
# The assembler of older ones spills a few bytes more.
spills = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 32
print(json.dumps(list(inspect(last_entry=True, spills=spills))))
"""


def compiled(code, *arguments):
    """In a process of its own: what the interpreter has taken over cannot be compiled."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, dispatch.INTERPRET: "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def inspected():
    done = compiled(INSPECT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_every_architecture(inspected):
    kernels = {path.stem for path in (ROOT / "decomp_kernels/kernels/configs").glob("*.json")}
    kernels.remove("implementations")  # the table of auto
    assert kernels == set(KERNELS)
    assert {(row["kernel"], row["arch"]) for row in inspected} == {
        (kernel, arch) for kernel in kernels for arch in LIMITS
    }
    assert [row for row in inspected if row["problems"]] == []


def test_bf16_products_run_on_matrix_units(inspected):
    for row in inspected:
        if row["kernel"] == "scatter":
            continue  # dot products of single columns
        wanted = {"gfx942": "mfma"}
        if row["kernel"] != "decode":  # whose 16 rows are too few for a warp group
            wanted |= {"sm_90": "wgmma", "sm_100": "tcgen05"}
        assert wanted.get(row["arch"], "mma.sync") in row["matrix"], row


BROKEN = """
import sys
sys.path.insert(0, "tests")
from triton_mutants import Mutant, planted
from decomp_kernels.cli import inspect

def problems(file, old, new, arch="sm_80", kernel="row_norm", last_entry=True):
    with planted(Mutant(file, "", old, new, "")):
        rows = inspect.inspect(kernels=[kernel], architectures=[arch], last_entry=last_entry)
        return "; ".join(problem for row in rows for problem in row["problems"])

print(problems("row_norm", "(0).to(tl.int64) * BLOCK_M", "(0) * BLOCK_M"))
print(problems("row_norm", "tl.sum(up", "tl.sums(up"))
print(problems("pieces", "tl.dot(a, b, acc", "tl.dot(a.to(tl.float32), b.to(tl.float32), acc"))
load, none = "source.load([first_row, first_col])", "tl.zeros((ROWS, COLS), tl.bfloat16)"
print(problems("fused_tiles", load, none, "sm_90", "fused_forward", last_entry=False))
inspect.LIMITS["sm_80"] = 1000
print(problems("row_norm", "tl.sum(up", "tl.sum(up"))
"""


def test_inspect_finds_what_it_looks_for():
    done = compiled(BROKEN)
    assert done.returncode == 0, done.stderr[-3000:]
    narrow, broken, scalar, copied, large = done.stdout.splitlines()
    assert "32-bit offsets: tt.load" in narrow
    assert "does not compile" in broken
    assert "no mma.sync" in scalar
    assert "no TMA copies" in copied
    assert "bytes of shared memory, 1000 are there" in large


def test_the_command_prints_a_table_and_fails_on_problems(monkeypatch, capsys, tmp_path):
    row = {"kernel": "row_norm", "specimen": "bf16", "entry": 0, "arch": "sm_90", "problems": []}
    full = {"shared": 1, "limit": 2, "registers": 3, "spilled": 0, "size": 4, "tma": 5}
    full["matrix"] = ["wgmma"]
    rows = [row | full]
    monkeypatch.setattr(inspect, "inspect", lambda **options: rows)
    assert main(["inspect"]) == 2  # interpreted here
    assert "unset it" in capsys.readouterr().err
    monkeypatch.delenv(dispatch.INTERPRET, raising=False)
    assert main(["inspect"]) == 0
    assert "wgmma" in capsys.readouterr().out
    assert main(["inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    document = tmp_path / "doc.md"
    document.write_text("no place")
    assert main(["inspect", "--into", str(document)]) == 2
    assert "must have one line <!-- inspect -->" in capsys.readouterr().err
    document.write_text("a\n<!-- inspect -->\n<!-- end of inspect -->\nb\n")
    assert main(["inspect", "--into", str(document)]) == 0
    assert "| row_norm | sm_90 | 1 of 1 | 1 | 232,448 | 3 | 0 | wgmma | 5 |" in document.read_text()
    rows.append(row | {"problems": ["does not compile"]})
    assert main(["inspect", "--into", str(document)]) == 1
    assert "| row_norm | sm_90 | 1 of 2 |" in document.read_text()
    capsys.readouterr()
    assert main(["inspect"]) == 1
    assert "1 of 2 compiled kernels have problems" in capsys.readouterr().err


SPECIALISED = """
from dataclasses import replace
from importlib import import_module
from decomp_kernels.cli.inspect import KERNELS, _compile
from decomp_kernels import tables

for kernel in KERNELS:
    module = import_module(f"decomp_kernels.kernels.triton.{kernel}")
    *_, specimen = module.specimens(tables.shipped(kernel)[0]["config"])
    names = {*specimen.types, *(f for b in specimen.types.get("branches", ()) for f in b._fields)}
    ones = sorted(names & {"M", "R", "N", "K", "C"})
    odd = {"ALIGNED": False} if "ALIGNED" in specimen.constants else {}
    constants = specimen.constants | odd
    _compile(replace(specimen, aligned=False, constants=constants), "sm_80")
    for unit in ones:
        _compile(replace(specimen, unit=(*specimen.unit, unit)), "sm_80")
    for entry in tables.shipped(kernel):
        if entry["arch"] == "sm_90" and entry["config"].get("DESCRIPTORS"):
            *_, specimen = module.specimens(entry["config"])
            _compile(replace(specimen, aligned=False, unit=("N", "R")), "sm_90")
    print(kernel)
"""


def test_odd_sizes_and_sizes_of_one_compile():
    """The launcher makes a constant of a size that is 1, and knows which are multiples of 16."""
    done = compiled(SPECIALISED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(KERNELS)
