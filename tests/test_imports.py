"""The arrows of docs/architecture.md, what importing loads, and platforms without Triton."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import decomp_kernels as dk
from layers import PEERS, RANK, SHARED_KERNELS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "decomp_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Every module of the package that a file names, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here, line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):  # f"decomp_kernels.ops.{op}"
                name = name.values[0]
            if isinstance(name, ast.Constant):
                found.add(str(name.value))
    return {name for name in found if name.split(".")[0] == "decomp_kernels"}


def _relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _violations(path: Path, imported: set[str]) -> list[str]:
    """What of ``imported`` the file at ``path``, inside the package, may not import."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        allowed = set(RANK) - {"cli", "bench", "testing"}
        return [name for name in imported if name.split(".")[1] not in allowed]
    wrong = []
    for name in sorted(imported):
        target = name.split(".")[1:]
        if not target or target[0] not in RANK:
            if parts[0] != "cli":  # which is a user like others, and has the root
                wrong.append(f"{name}: the package's root is for users, name the file itself")
        elif target[0] == parts[0] and len(parts) > 1:
            own_family = parts[1] == target[1] and target[1] in ("triton", "native")
            if parts[0] == "kernels" and target[1] not in SHARED_KERNELS and not own_family:
                wrong.append(f"{name}: kernel files never import each other")
        elif (parts[0], target[0]) not in PEERS and RANK[target[0]] >= RANK[parts[0]]:
            wrong.append(f"{name}: it is not below {parts[0]}")
    return wrong


def test_every_file_has_a_place():
    tops = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"}
    assert tops <= set(RANK), f"scripts/layers.py has no place for {sorted(tops - set(RANK))}"


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_arrows_point_one_way(path):
    assert _violations(path, _imports(path)) == []


@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("factors.py", "decomp_kernels.dispatch"),
        ("reference/dropout.py", "decomp_kernels.kernels.mask"),
        ("kernels/aten/decomposed_linear.py", "decomp_kernels.kernels.aten.hadamard"),
        ("kernels/aten/row_norm.py", "decomp_kernels.kernels.triton.column_walk"),
        ("kernels/triton/row_norm.py", "decomp_kernels.kernels.aten.row_norm"),
        ("kernels/gemm.py", "decomp_kernels.ops.decomposed_linear"),
        ("ops/decomposed_linear.py", "decomp_kernels.methods.base"),
        ("methods/lora.py", "decomp_kernels.linear.DecomposedLinear"),
        ("linear.py", "decomp_kernels.model"),
        ("model.py", "decomp_kernels.constraints"),
        ("bench/engine.py", "decomp_kernels.cli.main"),
        ("bench/engine.py", "decomp_kernels"),
    ],
)
def test_a_wrong_arrow_is_seen(file, imported):
    assert _violations(PACKAGE / file, {imported})


def test_imports_inside_functions_and_by_name_are_seen(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "def f(op):\n"
        "    from decomp_kernels.cli import main\n"
        "    import_module(f'decomp_kernels.ops.{op}')\n"
    )
    assert _imports(file) == {"decomp_kernels.cli.main", "decomp_kernels.ops."}


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_only_dispatch_asks_what_machine_this_is(path):
    if RANK.get(path.relative_to(PACKAGE).with_suffix("").parts[0], 99) > RANK["constraints"]:
        return  # benchmarks and the command line report on the machine
    if path.name != "dispatch.py":
        asks = r"os\.environ|os\.getenv|torch\.cuda\.|\.is_cuda\b|sys\.platform|platform\.system"
        assert re.findall(asks, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_a_file_can_be_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


OPTIONAL = ("accelerate", "matplotlib", "peft", "tqdm", "transformers", "triton", "yaml")


def test_importing_needs_torch_and_safetensors_alone():
    """Nothing is loaded that `import torch` does not load, safetensors and ourselves apart."""
    loaded = "{name.split('.')[0] for name in sys.modules}"
    new = _run(
        f"import sys, torch\nbefore = {loaded}\n"
        f"import decomp_kernels\nprint(*sorted({loaded} - before))"
    )
    assert set(new.split()) - sys.stdlib_module_names <= {"decomp_kernels", "safetensors"}


ELSEWHERE = """
import platform, sys, tempfile
import torch  # a real one is there; what it is built for is not what is asked here

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
before = set(sys.modules)
sys.platform = {sys_platform!r}
platform.system = lambda: {system!r}

import decomp_kernels as dk
from torch import nn

for name, method in dk.methods().items():
    layer = dk.DecomposedLinear(nn.Linear(12, 8), method())
    x = torch.randn(5, 12, requires_grad=True)
    layer(x).square().mean().backward()
    assert x.grad.isfinite().all(), name

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))

adapted = dk.adapt(model(), dk.LoRA(r=2), target_modules="all-linear")
for parameter in adapted.parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter)
x = torch.randn(3, 12)
with tempfile.TemporaryDirectory() as folder:
    dk.save_adapter(adapted, folder)
    again = dk.load_adapter(model(), folder)
torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)
torch.testing.assert_close(dk.merge(again)(x), adapted(x))
assert not any(name.split(".")[0] in {absent!r} for name in set(sys.modules) - before)
print("works")
"""


@pytest.mark.parametrize(
    ("sys_platform", "system"),
    [("darwin", "Darwin"), ("win32", "Windows"), ("linux", "Linux")],
    ids=["macOS", "Windows", "Linux-core-only"],
)
def test_every_method_runs_without_triton(sys_platform, system):
    """Simulated: the optional packages cannot be imported, and Python says it runs elsewhere."""
    code = ELSEWHERE.format(absent=OPTIONAL, sys_platform=sys_platform, system=system)
    assert _run(code).strip().endswith("works")


def _public() -> list[str]:
    return sorted(
        name
        for name, value in vars(dk).items()
        if not name.startswith("_") and not inspect.ismodule(value) and callable(value)
    )


@pytest.mark.parametrize("name", _public())
def test_every_public_name_is_described(name):
    """By its own words; a method class may be described at the head of its file."""
    value = getattr(dk, name)
    words = inspect.getdoc(value) or ""
    if inspect.isclass(value) and words.startswith(f"{name}("):  # what @dataclass writes by itself
        words = ""
    if inspect.isclass(value) and value in dk.methods().values():
        words += sys.modules[value.__module__].__doc__ or ""
    assert len(words.split()) >= 5, f"{name} has no docstring"
    if inspect.isclass(value):
        for method_name, method in vars(value).items():
            if inspect.isfunction(method) and not method_name.startswith("_"):
                assert inspect.getdoc(getattr(value, method_name)), f"{name}.{method_name}"


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_every_file_says_what_it_computes(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), "its first line says what it computes"
