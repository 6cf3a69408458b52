"""The model suite: what its contenders are, that they compute the same, and what is printed."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from decomp_kernels.bench import agreement, compiled, decoder, model_tables
from decomp_kernels.bench.contenders import (
    ACCELERATED,
    FORMULA,
    OURS,
    OURS_COMPILED,
    PEFT,
    PEFT_COMPILED,
)
from decomp_kernels.bench.engine import CONTROL, FROZEN, PHASES
from decomp_kernels.bench.observed import implementation
from decomp_kernels.cli.main import main
from decomp_kernels.testing import relative_error

pytest.importorskip("transformers")
pytest.importorskip("peft")

CPU = torch.device("cpu")
TINY = {
    "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocab": 64,
    "batch": 2, "sequence": 8,
}  # fmt: skip
LINEARS = 2 * 7
WORDS = [word for name, size in TINY.items() for word in (f"--{name.replace('_', '-')}", size)]


def one_row(method, dtype="float32", **options):
    options = {"rank": 4, "checkpointing": ("none",)} | options
    (row,) = decoder.rows([method], decoder.Size(**TINY), [dtype], **options)
    return row


def build(row, **options):
    trainees, left_out = decoder.build(row, seed=0, device=CPU, **options)
    assert not left_out
    return {trainee.name: trainee for trainee in trainees}


def measured(row, **options):
    return decoder.run(row, rounds=2, warmup=1, seed=0, device=CPU, **options)


# --- what the contenders compute ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "dora", "ssb"])
def test_all_contenders_have_the_same_loss_and_gradients(method, dtype):
    made = build(one_row(method, dtype))
    contenders = agreement.agree(list(made.values()), one_row(method).make(), dtype)
    peers = {FORMULA} if method == "ssb" else {PEFT, ACCELERATED}
    assert set(contenders) == {FROZEN, CONTROL, OURS} | peers
    loss, gradients = (1e-6, 1e-5) if dtype == "float32" else (1e-3, 3e-2)
    ours = contenders[OURS]
    for name in peers:
        assert abs(contenders[name]["loss"] - ours["loss"]) < loss * ours["loss"]
        assert contenders[name]["gradient_error"] < gradients
        sizes = [sum(p.numel() for p in made[who].trained) for who in (name, OURS)]
        assert sizes[0] == sizes[1] > 0
    frozen = contenders[FROZEN]
    assert frozen["loss"] == contenders[CONTROL]["loss"]
    assert abs(frozen["loss"] - ours["loss"]) > 1e-5 * ours["loss"]  # the adapters do something
    assert not made[FROZEN].trained


def test_float32_adapters_on_a_narrow_model():
    row = one_row("lora", "bfloat16", adapter_dtypes=("float32",))
    made = build(row)
    for name in (OURS, PEFT, ACCELERATED):
        assert {p.dtype for p in made[name].trained} == {torch.float32}
    found = agreement.agree(list(made.values()), row.make(), row.dtype)
    assert found[PEFT]["gradient_error"] < 3e-2
    rows = list(
        decoder.rows(["lora"], decoder.Size(**TINY), ["float32"], rank=4,
                     checkpointing=("none",), adapter_dtypes=("base", "float32"))
    )  # fmt: skip
    assert len(rows) == 1, "of a float32 model both are one"


def test_a_peer_with_other_values_is_refused(monkeypatch):
    monkeypatch.setattr(decoder, "copy_adapters", lambda *_: None)
    with pytest.raises(agreement.Disagreement, match="PEFT must compute what ours does"):
        measured(one_row("lora"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peer_with_another_scale_is_refused(monkeypatch, dtype):
    copied = agreement.copy_adapters

    def and_scaled(ours, method, peer):
        copied(ours, method, peer)
        for module in peer.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 1.1

    monkeypatch.setattr(decoder, "copy_adapters", and_scaled)
    with pytest.raises(agreement.Disagreement, match="its gradients differ by"):
        measured(one_row("lora", dtype))


def test_with_dropout_the_models_are_compared_without_their_masks():
    for method in ("lora", "dora"):
        row = one_row(method, dropouts=(0.5,))
        assert row.label == f"{method}, dropout 0.5"
        made = build(row)
        found = agreement.agree(list(made.values()), row.make(), row.dtype)
        assert found[PEFT]["gradient_error"] < 1e-5
        assert found[PEFT]["loss"] == pytest.approx(found[OURS]["loss"], rel=1e-6)
        ours = made[OURS]
        assert ours.loss().item() != ours.loss().item(), "a training step has its dropout"
    assert dict(one_row("ssb", dropouts=(0.5,)).options) == {}


def test_models_share_the_base_and_nothing_else():
    made = build(one_row("lora"))
    base = made[FROZEN].model.model.layers[0].mlp.up_proj.weight.data_ptr()
    adapters = []
    for trainee in made.values():
        layer = trainee.layers["model.layers.0.mlp.up_proj"]
        weight = getattr(layer, "base_layer", layer).weight
        assert weight.data_ptr() == base, trainee.name
        assert not weight.requires_grad
        adapters += [p.data_ptr() for p in trainee.trained]
    assert len(set(adapters)) == len(adapters) == 3 * 2 * LINEARS


def test_a_step_moves_everything_that_is_trained_and_nothing_else():
    for name, trainee in build(one_row("dora")).items():
        before = {key: p.clone() for key, p in trainee.model.named_parameters()}
        trainee.reset()
        trainee.backward(trainee.loss())
        assert trainee.x.grad is not None
        for key, p in trainee.model.named_parameters():
            assert torch.equal(p, before[key]) != p.requires_grad, (name, key)


def test_no_trained_tensor_is_at_its_start():
    for trainee in build(one_row("lora", "bfloat16")).values():
        assert all((p != 0).all() for p in trainee.trained)


# --- which way they took ------------------------------------------------------------------------


def test_paths_are_what_was_seen(monkeypatch):
    row = one_row("lora")
    found = {name: got["path"] for name, got in measured(row)["contenders"].items()}
    assert found[FROZEN] == found[CONTROL] == f"{LINEARS} x torch.nn.modules.linear.Linear"
    assert implementation(found[OURS]) == "aten"
    assert found[PEFT] == f"{LINEARS} x peft.tuners.lora.layer.Linear"
    way, calls = implementation(found[ACCELERATED]).split(", ")
    fused, of, every, *_ = calls.split()
    assert (way, of) == ("aten", "of")
    assert fused == every
    assert int(fused) % LINEARS == 0
    monkeypatch.setenv("DECOMP_KERNELS_IMPL", "reference")
    ours = build(row)[OURS]
    ours.observe()
    assert ours.path() == "reference"


def test_a_layer_that_falls_back_shows_in_the_path():
    accelerated = build(one_row("lora"))[ACCELERATED]
    layer = accelerated.layers["model.layers.0.mlp.up_proj"]
    layer.base_layer.register_forward_hook(lambda *_: None)  # PEFT's own forward calls it
    accelerated.observe()
    fused = f"{2 * (LINEARS - 1)} of {2 * LINEARS} calls fused"
    assert implementation(accelerated.path()) == f"aten, {fused}"


def test_checkpointing_keeps_less_and_computes_the_same():
    plain, again = (
        measured(one_row("dora", checkpointing=(kind,)))["contenders"] for kind in ("none", "block")
    )
    for name, got in again.items():
        assert got["saved_bytes"] < 0.6 * plain[name]["saved_bytes"], name
        assert got["peak_bytes"] < plain[name]["peak_bytes"], name
        assert got["loss"] == pytest.approx(plain[name]["loss"], rel=1e-6)
    assert int(again[PEFT]["path"].split()[0]) > LINEARS  # forwards ran again


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_under_a_compiler_graphs_and_breaks_are_counted(method):
    row = replace(one_row(method, targets=("q_proj",)), size=decoder.Size(**TINY | {"layers": 1}))
    with compiled.fresh_compiler():
        made = build(row, backend="aot_eager")
        compared = [made[name] for name in (OURS, OURS_COMPILED, PEFT_COMPILED)]
        for trainee in compared:
            trainee.observe()
        found = agreement.agree(compared, row.make(), row.dtype)
    assert all(found[trainee.name]["gradient_error"] < 1e-5 for trainee in compared[1:])
    assert made[OURS_COMPILED].path() == "aot_eager: 1 graph, 0 breaks"
    graphs, breaks = made[PEFT_COMPILED].path().removeprefix("aot_eager: ").split(", ")
    if method == "lora":
        assert (graphs, breaks) == ("1 graph", "0 breaks")
    else:  # PEFT's asks for the name of its weight's class, which the compiler cannot follow
        assert int(graphs.split()[0]) > 1
        assert int(breaks.split()[0]) > 0


def test_what_is_compiled_later_or_not_at_all_is_said():
    with compiled.fresh_compiler():
        run = compiled.Compiled(nn.Linear(3, 5), "aot_eager")
        run.prepare(lambda: run(torch.ones(2, 3)).sum().backward())
        assert run.path() == "aot_eager: 1 graph, 0 breaks"
        run(torch.ones(4, 3))
        assert run.path() == "aot_eager: 1 graph, 0 breaks, 1 compiled later"
    with compiled.fresh_compiler(), torch.compiler.set_stance("force_eager"):
        run = compiled.Compiled(nn.Linear(3, 5), "aot_eager")
        run.prepare(lambda: run(torch.ones(2, 3)).sum().backward())
    assert run.path() == "not compiled: aot_eager was given no graph"


def test_more_layers_than_the_compilers_limit_are_compiled_each():
    from torch._dynamo import graph_break

    class Broken(nn.Linear):
        def forward(self, x):
            graph_break()
            return super().forward(x)

    widths = range(3, 15)  # more than 8, at which the compiler gives up without a word
    with compiled.fresh_compiler():
        layers = nn.Sequential(*[Broken(a, a + 1) for a in widths])
        run = compiled.Compiled(layers, "eager")
        run.prepare(lambda: run(torch.ones(2, 3)).sum().backward())
    assert run.prepared >= len(widths)


# --- the command ----------------------------------------------------------------------------------


def bench(*words):
    return main(["bench", "model", *map(str, words)])


def test_the_command_writes_rows_table_and_picture(tmp_path, capsys):
    output, image = tmp_path / "out" / "model.json", tmp_path / "model.png"
    words = ("--methods", "lora", "ssb", "--dtype", "float32", "--rank", 4, "--rounds", 3)
    assert bench(*WORDS, *words, "--checkpointing", "none", "--threads", 1,
                 "--output", output, "--picture", image) == 0  # fmt: skip
    content = json.loads(output.read_text())
    assert content["suite"] == "model"
    assert content["protocol"]["rounds"] == 3
    assert [row["label"] for row in content["rows"]] == ["lora", "ssb"]
    for row in content["rows"]:
        assert row["size"] == TINY
        assert row["parameters"] == decoder.Size(**TINY).parameters + 5 * 32  # and the norms
        for name, got in row["contenders"].items():
            assert set(got["ratio"]) == set(got["ns"]) == set(PHASES), name
            assert all(len(ns) == 3 and min(ns) > 0 for ns in got["ns"].values())
            ns = got["ns"]["both"]
            ratios = sorted(a / b for a, b in zip(ns, row["contenders"][row["peer"]]["ns"]["both"],
                                                  strict=True))  # fmt: skip
            assert got["over_peer"]["both"]["median"] == pytest.approx(ratios[1])
            assert got["tokens_per_second"]["median"] == pytest.approx(16e9 / sorted(ns)[1])
            assert got["peak_bytes"] >= got["saved_bytes"] > 0
    printed, told = capsys.readouterr()
    assert "2 layers of 32 and 48, 0.0 M parameters, 2 x 8 tokens, fp32" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| ssb")]
    assert [line.split("|")[2].strip() for line in lines] == [
        "frozen model", "the same again (control)", "ours", "formula",
    ]  # fmt: skip
    assert "2/2  ssb, fp32, checkpointing none: x frozen: control" in told
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_method_that_nobody_else_has_in_these_tensors_runs_alone(capsys):
    row = one_row("pissa")
    found = measured(row)
    assert set(found["contenders"]) == {FROZEN, CONTROL, OURS}
    assert found["peer"] is None
    *_, absent = model_tables.tables({"rows": [found]})
    assert absent.lines == [
        ("pissa", "fp32", "peer", "PEFT has pissa in tensors that cannot be given our values")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "lorra"), "method must be one of"),
        (
            ("--hidden", 30),
            "hidden must be an even multiple of heads, got 30 and 4; take",
        ),
        (("--kv-heads", 3), "heads must be a multiple of kv_heads, got 4 and 3"),
        (("--dropout", 1.5), "dropout must be"),
        (("--layers", 10**9), "the sizes must fit the memory of cpu"),
        (("--methods", "oft", "--rank", 7), "r must"),
        (("--compile", "no_such"), "--compile no_such must be a backend of torch.compile"),
        (("--device", "cuda:77"), "--device cuda:77 needs a device that PyTorch sees"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(words, said, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was measured")

    monkeypatch.setattr(decoder, "run", never)
    assert bench(*WORDS, "--rank", 4, *words) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_a_disagreement_ends_the_command(monkeypatch, capsys):
    monkeypatch.setattr(decoder, "copy_adapters", lambda *_: None)
    assert bench(*WORDS, "--methods", "lora", "--dtype", "float32", "--rank", 4) == 1
    assert "lora, float32: PEFT must compute what ours does" in capsys.readouterr().err


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch, tmp_path, capsys):
    rows, run = [], decoder.run

    def once(row, **options):
        if rows:
            raise KeyboardInterrupt
        rows.append(row)
        return run(row, **options)

    monkeypatch.setattr(decoder, "run", once)
    output = tmp_path / "model.json"
    words = (*WORDS, "--methods", "lora", "ssb", "--dtype", "float32", "--rank", 4, "--rounds", 1,
             "--checkpointing", "none", "--output", output)  # fmt: skip
    assert bench(*words) == 130
    (row,) = json.loads(output.read_text())["rows"]
    assert row["method"] == "lora"
    monkeypatch.setattr(decoder, "run", run)
    assert bench(*words, "--resume") == 0
    first, second = json.loads(output.read_text())["rows"]
    assert first == row and second["method"] == "ssb"
    assert bench(*words, "--resume", "--rounds", 2) == 2
    assert "has rounds 1, asked for is rounds 2" in capsys.readouterr().err


def test_gradients_of_checkpointed_models_are_those_of_plain_ones():
    plain, again = (build(one_row("lora", checkpointing=(k,)))[OURS] for k in ("none", "block"))
    for trainee in (plain, again):
        trainee.loss().backward()
    for p, q in zip(again.trained, plain.trained, strict=True):
        assert relative_error(p.grad, q.grad) < 1e-6
