"""torch.export of adapted models: the program computes what the model does, here and elsewhere."""

import subprocess
import sys

import pytest
import torch
from tiny_models import adapted, tiny_llama, two_linears

import decomp_kernels as dk

METHODS = {
    "lora": dk.LoRA(r=4, dropout=0.1),
    "dora": dk.DoRA(r=4, dropout=0.1),
    "dora-cached": dk.DoRA(r=4, cache_norm=True),
    "ssb": dk.SSB(),
    **{name: dk.methods()[name].small() for name in ("ia3", "adalora", "oft", "boft", "svdiff")},
    **{name: dk.methods()[name].small() for name in ("vera", "loha", "lokr", "hra", "sparse")},
}
BATCH = ({0: torch.export.Dim("batch", min=1, max=4096)},)


def calls(program, name):
    """The calls of one of our operators in an exported program."""
    return [
        node
        for module in program.graph_module.modules()
        for node in getattr(module, "graph", torch.fx.Graph()).nodes
        if str(node.target) == f"decomp_kernels.{name}.default"
    ]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_program_of_any_batch_computes_what_the_model_does(method, strict):
    """Batches on both sides of where methods choose by size."""
    model = adapted(two_linears(), method).eval()
    base = two_linears()
    base.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(5, 24),), strict=strict, dynamic_shapes=BATCH
        )
        for batch in (1, 3, 200):
            x = torch.randn(batch, 24)
            torch.testing.assert_close(program.module()(x), model(x))
            assert not torch.allclose(program.module()(x), base(x), atol=1e-3)
    assert len(calls(program, "decomposed_linear_fwd")) >= 2


def test_a_program_of_evaluation_keeps_nothing_for_a_backward():
    """SSB's backward would want the tensor before its output scale, as large as the output."""
    model = adapted(two_linears(), dk.SSB())
    x = torch.randn(5, 24)
    schema = torch.ops.decomp_kernels.decomposed_linear_fwd.default._schema
    place = [argument.name for argument in schema.arguments].index("keep")
    with torch.no_grad():
        evaluated = torch.export.export(model, (x,))
    trained = torch.export.export(model, (x,))
    for program, kept in ((evaluated, [False, False]), (trained, [False, True])):
        found = [node.args[place] for node in calls(program, "decomposed_linear_fwd")]
        assert found == [kept] * 2


def test_a_program_of_training_draws_its_masks_from_torchs_generator():
    model = adapted(two_linears(), dk.LoRA(r=4, dropout=0.5)).train()
    x = torch.randn(5, 24)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(program(x))
            torch.manual_seed(seed)
            torch.testing.assert_close(outputs[-1], model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


class Logits(torch.nn.Module):
    """A tensor in place of transformers' output class, which a saved program would need."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


ELSEWHERE = """
import sys, torch
{load}
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2").module()
    x, y = torch.load(path + ".pt")
    torch.testing.assert_close(program(x), y)
print("equal")
"""


def run_elsewhere(load, *paths):
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(load=load), *map(str, paths)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Exported and saved: a Llama with each method, its input and its output."""
    folder = tmp_path_factory.mktemp("programs")
    ids = torch.randint(0, 64, (2, 8))
    for name in ("lora", "dora", "ssb"):
        torch.manual_seed(0)
        model = Logits(adapted(tiny_llama(1), METHODS[name])).eval()
        with torch.no_grad():
            program = torch.export.export(model, (ids,), strict=False)
            torch.export.save(program, folder / f"{name}.pt2")
            torch.save((ids, model(ids)), folder / f"{name}.pt")
    return folder


def test_a_saved_program_runs_in_another_process(saved):
    """It needs the operators, and neither the model's class nor transformers' code."""
    done = run_elsewhere("import decomp_kernels", *(saved / n for n in ("lora", "dora", "ssb")))
    assert done.stdout.strip() == "equal", done.stderr
    done = run_elsewhere("", saved / "lora")
    assert done.returncode != 0 and "decomp_kernels" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "dora", "ssb"])
def test_ahead_of_time_compilation(method, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = adapted(two_linears(), METHODS[method]).eval()
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(5, 24),), dynamic_shapes=BATCH)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (2, 7):
            x = torch.randn(batch, 24)
            torch.testing.assert_close(loaded(x), model(x))
