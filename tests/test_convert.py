"""Adapters as plain LoRA, and ``decomp-kernels convert`` between the formats."""

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft_folders import CASES, TARGETS, M, Net, config_of, inputs, moved, ours, tensors_of

import decomp_kernels as dk
from decomp_kernels.cli.main import main
from decomp_kernels.interop.lowrank import as_lora
from decomp_kernels.linear import adapted_layers
from decomp_kernels.testing import relative_error

# Rank of the exact LoRA, of adapters with r = 4 (and n = 3, or as it says).
EXACT = {
    "lora": (M["lora"](r=4, alpha=6), 4),
    "rslora": (M["lora"](r=4, alpha=6, use_rslora=True), 4),
    "lora_bias": (M["lora"](r=4, lora_bias=True), 4),
    "pissa": (M["pissa"](r=4, alpha=6), 8),
    "milora": (M["milora"](r=4), 8),
    "lora_dash": (M["lora_dash"](r=4, n_directions=3), 7),
    "spectral_additive": (M["spectral_additive"](r=4), 8),
    "spectral_rotational": (M["spectral_rotational"](r=4), 4),
    "trilora": (M["trilora"](r=4, alpha=6), 4),
    "flora": (M["flora"](r=4, alpha=6), 4),
    "moslora": (M["moslora"](r=4, alpha=6), 4),
    "adalora": (M["adalora"](r=4, target_r=2, alpha=6), 4),
    "vera": (M["vera"](r=6), 6),
    "hra": (M["hra"](r=4), 4),
    "loha": (M["loha"](r=2), 4),
}


def documented():
    """{method: (PEFT configuration, rank or reason)}, the table of docs/files.md."""
    text = (Path(__file__).parent.parent / "docs" / "files.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", text, re.M)
    return {name: (config, rank) for name, config, rank in rows}


NOT_EXACT = sorted(name for name, (_, rank) in documented().items() if "`" not in rank)


def adapted(method, dtype=torch.float64):
    return moved(dk.adapt(Net(dtype), method, TARGETS))


@pytest.mark.parametrize("name", EXACT)
def test_a_low_rank_update_is_exactly_a_lora(name):
    method, rank = EXACT[name]
    model, x = adapted(method), inputs()
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3
    report = as_lora(model)
    assert relative_error(model(x), y) < 1e-12
    assert {path: layer.rank for path, layer in report.items()} == dict.fromkeys(TARGETS, rank)
    assert report.error == 0.0
    for path, layer in adapted_layers(model).items():
        adapter = layer.adapters["default"]
        assert type(adapter.method) is M["lora"]
        assert report[path].update > 0.1
    model(x).sum().backward()  # and it trains
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_table_of_the_documents_names_every_method():
    table = documented()
    assert table.keys() == M.keys()
    for name, method in M.items():
        form = method.peft_form
        assert table[name][0] == ("no" if form is None else f"`{form.config}`"), name
    for name, (method, rank) in EXACT.items():
        formula = table[method.name][1].split("`")[1]
        assert eval(formula, {}, vars(method)) == rank, name
    assert {method.name for method, _ in EXACT.values()} | set(NOT_EXACT) == M.keys()


@pytest.mark.parametrize("name", NOT_EXACT)
def test_another_update_is_refused_with_the_reason(name):
    model, x = adapted(M[name].small()), inputs()
    y = model(x)
    with pytest.raises(ValueError, match=documented()[name][1].partition(":")[0]):
        as_lora(model)
    assert torch.equal(model(x), y)


LINEAR = [n for n in NOT_EXACT if n != "bitfit" and M[n].small().why_not_mergeable is None]


@pytest.mark.parametrize("name", LINEAR)
def test_a_rank_gives_the_nearest_update_of_that_rank(name):
    model = adapted(M[name].small())
    update = {p: updated(layer) for p, layer in adapted_layers(model).items()}
    report = as_lora(model, rank=5)
    lost = total = 0.0
    for path, layer in adapted_layers(model).items():
        wanted, got = update[path], updated(layer)
        S = torch.linalg.svdvals(wanted)
        error = (got - wanted).norm() / wanted.norm()
        assert report[path].rank == 5
        assert abs(report[path].error - error) < 1e-9
        assert abs(error - S[5:].norm() / S.norm()) < 1e-9  # Eckart and Young's
        assert layer.adapters["default"].method == dk.LoRA(r=5, alpha=5.0)
        lost, total = lost + (got - wanted).norm() ** 2, total + wanted.norm() ** 2
    assert abs(report.error - (lost / total) ** 0.5) < 1e-9
    assert 1e-3 < report.error < 1


def updated(layer):
    """W' - W in float64."""
    return layer.merged_values()[0] - layer.base_weight()


def test_a_rank_that_is_enough_changes_nothing_and_a_lower_one_is_the_nearest():
    model, x = adapted(dk.PiSSA(r=3, alpha=6)), inputs()
    y = model(x)
    report = as_lora(copy.deepcopy(model), rank=6)
    assert report.error == 0.0
    assert {layer.rank for layer in report.values()} == {6}
    report = as_lora(model, rank=2)
    assert {layer.rank for layer in report.values()} == {2}
    assert 0 < report.error < 1
    assert 0 < relative_error(model(x), y) < 1


def test_zeroed_ranks_are_left_out():
    model, x = adapted(dk.AdaLoRA(r=4, target_r=2)), inputs()
    with torch.no_grad():
        model.block.up.adapters["default"].core[[0, 2]] = 0
        model.block.down.adapters["default"].core.zero_()
    y = model(x)
    report = as_lora(model)
    assert [layer.rank for layer in report.values()] == [2, 1, 4]
    assert report["block.down"].error == 0.0
    assert relative_error(model(x), y) < 1e-12


def test_a_float32_adapter_on_bf16_loses_one_rounding():
    model = adapted(dk.PiSSA(r=4, alpha=6), torch.bfloat16)
    before = {p: m.adapters["default"].method.lower(m.adapters["default"], m.base())
              for p, m in adapted_layers(model).items()}  # fmt: skip
    as_lora(model)
    for path, layer in adapted_layers(model).items():
        adapter, old = layer.adapters["default"], before[path]
        assert adapter.up.dtype == torch.float32
        exact = old.scale * old.up.double() @ old.down.double()
        assert relative_error(adapter.up.double() @ adapter.down.double(), exact) < 1e-7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: as_lora(m, rank=0), "rank must be at least 1, got 0"),
        (lambda m: as_lora(m, rank=1.5), "rank must be an int or None, got 1.5"),
        (lambda m: as_lora(m, "b"), "no adapter 'b'"),
        (lambda m: as_lora(dk.merge(m)), "is merged; call unmerge"),
        (lambda m: as_lora(adapted(dk.BitFit()), rank=4), "changes the bias"),
        (lambda m: as_lora(adapted(dk.LoRA(activation="relu"))), "a relu between down and up"),
        (lambda m: as_lora(adapted(dk.LoRA(activation="relu")), rank=4), "not linear in x"),
    ],
)
def test_what_as_lora_refuses(change, words):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        change(moved(dk.adapt(Net(), dk.DoRA(r=4), TARGETS)))


# The command


def run(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("name", CASES)
def test_to_peft_and_back_without_the_base(name, tmp_path):
    """Nothing of the base is needed, and nothing is lost but what PEFT's files do not say."""
    model, x = ours(CASES[name]), inputs()
    dk.save_adapter(model, tmp_path / "ours")
    dk.save_adapter(model, tmp_path / "direct", format="peft")
    assert run(tmp_path / "ours", tmp_path / "peft", "--to", "peft") == 0
    converted, direct = tensors_of(tmp_path / "peft"), tensors_of(tmp_path / "direct")
    assert converted.keys() == direct.keys()
    assert all(torch.equal(converted[key], direct[key]) for key in direct)
    assert config_of(tmp_path / "peft") | {"target_modules": 0} == (
        config_of(tmp_path / "direct") | {"target_modules": 0}
    )
    assert run(tmp_path / "peft", tmp_path / "back", "--to", "decomp_kernels") == 0
    again = dk.load_adapter(Net(), tmp_path / "back")
    assert relative_error(again(x), model(x)) < 1e-12
    other = dk.load_adapter(Net(seed=1), tmp_path / "back")  # its base is not recorded
    assert relative_error(other(x), model(x)) > 1e-3
    with pytest.raises(dk.AdapterFileError, match="another base"):
        dk.load_adapter(Net(seed=1), tmp_path / "ours")


def test_peft_takes_the_exact_expression_of_names(tmp_path):
    model = ours(CASES["lora"])
    dk.save_adapter(model, tmp_path / "ours")
    assert run(tmp_path / "ours", tmp_path / "peft", "--to", "peft") == 0
    assert config_of(tmp_path / "peft")["target_modules"].startswith("^(block")
    stock = peft.PeftModel.from_pretrained(Net(), tmp_path / "peft")
    assert relative_error(stock(inputs()), model(inputs())) < 1e-12


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (source, name)
        for name, (method, _) in EXACT.items()
        for source in ("decomp_kernels", "peft")
        if name != "hra" and (source != "peft" or method.peft_form is not None)
    ],
)
def test_to_lora_without_the_base(source, name, tmp_path, capsys):
    method, rank = EXACT[name]
    model = dk.adapt(Net(), method, TARGETS, modules_to_save=["head"])
    model, x = moved(model), inputs()
    dk.save_adapter(model, tmp_path / "ours", format=source)
    if source == "peft" and name == "vera":  # up_scale [N] and core [r]: K is nowhere
        assert run(tmp_path / "ours", tmp_path / "lora", "--to", "lora") == 2
        assert "cannot be told from the adapter alone" in capsys.readouterr().err
        return
    assert run(tmp_path / "ours", tmp_path / "lora", "--to", "lora") == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[2:5]] == [
        [path, str(rank), "0.000e+00"] for path in sorted(TARGETS)
    ] or source == "decomp_kernels"
    stock = peft.PeftModel.from_pretrained(Net(), tmp_path / "lora")
    assert stock.peft_config["default"].peft_type == "LORA"
    assert relative_error(stock(x), model(x)) < 1e-12


def llama(folder, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def test_with_the_base(tmp_path, capsys):
    base, tokens = llama(tmp_path / "base"), torch.tensor([[5, 7, 11, 13]])
    model = moved(dk.adapt(base, dk.HRA(r=4), ["q_proj", "v_proj"]))
    y = model(tokens).logits
    dk.save_adapter(model, tmp_path / "ours")
    assert run(tmp_path / "ours", tmp_path / "lora", "--to", "lora") == 2
    assert "a conversion needs --base here" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
    given = ("--base", tmp_path / "base")
    assert run(tmp_path / "ours", tmp_path / "lora", "--to", "lora", *given) == 0
    config = config_of(tmp_path / "lora")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    stock = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert relative_error(stock(tokens).logits, y) < 1e-5
    assert run(tmp_path / "lora", tmp_path / "back", "--to", "decomp_kernels", *given) == 0
    again = dk.load_adapter(llama(tmp_path / "again"), tmp_path / "back")
    assert relative_error(again(tokens).logits, y) < 1e-5
    with pytest.raises(dk.AdapterFileError, match="another base"):  # it is recorded now
        dk.load_adapter(llama(tmp_path / "other", seed=1), tmp_path / "back")
    capsys.readouterr()
    other = ("--base", tmp_path / "other")
    assert run(tmp_path / "ours", tmp_path / "x", "--to", "lora", *other) == 2
    assert "trained on another base" in capsys.readouterr().err


def test_a_rank_on_the_command_line_prints_the_errors(tmp_path, capsys):
    base = llama(tmp_path / "base")
    model = moved(dk.adapt(base, dk.OFT(block_size=8), ["q_proj", "v_proj"]))
    dk.save_adapter(model, tmp_path / "ours")
    given = (tmp_path / "ours", tmp_path / "lora", "--to", "lora", "--base", tmp_path / "base")
    assert run(*given) == 2
    assert "not exactly a LoRA: it changes the whole weight" in capsys.readouterr().err
    assert run(*given, "--rank", "3") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    errors = {words[0]: float(words[-1]) for words in lines[2:5]}
    report = as_lora(model, rank=3)
    assert errors["all"] == pytest.approx(report.error, rel=1e-3)
    assert 0.01 < errors["all"] < 1
    for path, layer in report.items():
        assert errors[path] == pytest.approx(layer.error, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing", "target", "--to", "peft"], "must hold an adapter that save_adapter wrote"),
        (["ours", "ours", "--to", "peft"], "must be two folders"),
        (["ours", "peft", "--to", "peft"], "has an adapter (adapter_config.json); --overwrite"),
        (["ours", "peft", "--to", "decomp_kernels", "--overwrite"], "adapter of another format"),
        (["ours", "x", "--to", "peft", "--rank", "3"], "--rank is for --to lora"),
        (["ours", "x", "--to", "lora", "--rank", "0"], "rank must be at least 1"),
        (["ours", "x", "--to", "lora", "--base", "./nothing"], "--base must be a folder"),
        (["ssb", "x", "--to", "peft"], "PEFT has no SSB"),
        (["ssb", "x", "--to", "lora"], "SSB on block.up is not exactly a LoRA: it scales"),
        (
            ["ssb", "x", "--to", "lora", "--rank", "2"],
            "the update of block.up is computed from its base weight, which must be at hand",
        ),
    ],
)
def test_what_the_command_refuses(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dk.save_adapter(ours(CASES["lora"]), "ours")
    dk.save_adapter(ours(CASES["lora"]), "peft", format="peft")
    dk.save_adapter(moved(dk.adapt(Net(), dk.SSB(), TARGETS)), "ssb")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwriting(tmp_path):
    dk.save_adapter(ours(CASES["rslora"]), tmp_path / "ours")
    dk.save_adapter(ours(CASES["lora"]), tmp_path / "peft", format="peft")
    assert run(tmp_path / "ours", tmp_path / "peft", "--to", "peft", "--overwrite") == 0
    assert config_of(tmp_path / "peft")["use_rslora"] is True
