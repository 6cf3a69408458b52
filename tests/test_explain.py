"""``explain``: the path it names is the path that runs; its FLOPs and bytes are those counted."""

import importlib
import json

import pytest
import torch
from torch import nn

import decomp_kernels as dk
from decomp_kernels import dispatch, native_library, roofline, tables
from decomp_kernels.cli.main import main
from decomp_kernels.explanation import _Counting
from decomp_kernels.kernels.aten import decomposed_linear as aten
from decomp_kernels.kernels.native import decomposed_linear as native
from decomp_kernels.reference import decomposed_linear as reference
from decomp_kernels.roofline import GPUS, Terms


def layer(method, dtype=torch.float32, size=(24, 20)):
    return dk.DecomposedLinear(nn.Linear(*size, dtype=dtype), method, dtype=dtype)


@pytest.fixture
def calls(monkeypatch):
    """Counts the implementations' own functions as they are called."""
    seen = {"forward": [], "backward": []}
    modules = {"aten": aten, "reference": reference}
    for form in dispatch.TRITON_FORMS:
        files = {"triton:passes": "decomposed_linear", "triton:fused": "decomposed_linear_fused"}
        name = f"decomp_kernels.kernels.triton.{files[form]}"
        modules[form] = importlib.import_module(name)
    modules["native:passes"] = native
    for impl, module in modules.items():
        for direction in seen:
            original = getattr(module, direction)

            def counted(*args, _impl=impl, _direction=direction, _original=original):
                seen[_direction].append(_impl)
                return _original(*args)

            monkeypatch.setattr(module, direction, counted)
    node = native_library.autograd_node()

    def compiled(*args):  # the same library calls, from autograd's own node
        seen["forward"].append("aten")
        y = node(*args)
        y.grad_fn.register_prehook(lambda _: seen["backward"].append("aten"))
        return y

    monkeypatch.setattr(native_library, "autograd_node", lambda: node and compiled)
    return seen


def run(module, tokens):
    module(torch.randn(tokens, 24).requires_grad_()).sum().backward()


IMPLS = ("auto", "reference", "aten", *dispatch.TRITON_FORMS)
IMPLS += () if native_library.why_not_loaded() else ("native:passes",)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("by", ["option", "environment"])
def test_the_path_it_names_is_the_path_that_runs(calls, monkeypatch, impl, by):
    if by == "environment":
        monkeypatch.setenv(dispatch.VARIABLE, impl)
    module = layer(dk.DoRA(r=4, impl=impl if by == "option" else "auto"))
    explained = dk.explain(module, tokens=5)
    run(module, 5)
    assert calls == {"forward": [explained.forward.impl], "backward": [explained.backward.impl]}
    if impl != "auto":
        assert explained.forward.impl == impl
        assert ("DECOMP_KERNELS_IMPL" in explained.forward.why) == (by == "environment")


MEASURED = {"on": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-21"}


def measured(forward, backward, **limits):
    return {
        "arch": "sm_90", "operator": "decomposed_linear", "when": limits, "measured": MEASURED,
        "forward": forward, "backward": backward,
    }  # fmt: skip


@pytest.fixture
def on_an_h200(monkeypatch, tmp_path):
    """The tables and the dispatch of an sm_90 device, its kernels interpreted."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tables, "user_folder", lambda: tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def forget():
    tables.entries.cache_clear()
    dispatch.measured_choice.cache_clear()


def test_auto_takes_what_was_measured_fastest_and_explain_says_so(calls, on_an_h200):
    small, large = {"M_max": 8, "NK_max": 500, "r_max": 4}, {"M_max": 64, "NK_max": 500, "r_max": 4}
    made = [measured("aten", "triton:passes", **small), measured("triton:passes", "aten", **large)]
    tables.write(on_an_h200, tables.IMPLEMENTATIONS, made)
    module = layer(dk.LoRA(r=4))
    for tokens, expected in ((5, ("aten", "triton:passes")), (33, ("triton:passes", "aten"))):
        calls["forward"].clear(), calls["backward"].clear()
        run(module, tokens)
        assert (*calls["forward"], *calls["backward"]) == expected
        for device in (None, "H200"):
            explained = dk.explain(module, tokens, device)
            assert (explained.forward.impl, explained.backward.impl) == expected
            assert explained.forward.why == "the fastest on NVIDIA H200, measured 2026-11-21"
    for tokens, rank in ((65, 4), (33, 5)):  # outside what was measured
        explained = dk.explain(layer(dk.LoRA(r=rank)), tokens, "H200")
        assert explained.forward.impl == explained.backward.impl == "aten"
        assert "nobody has measured this on sm_90" in explained.forward.why
    assert "sm_100" in dk.explain(module, 33, "B200").forward.why  # another architecture's table


def test_a_measured_choice_that_cannot_run_is_library_calls(on_an_h200, monkeypatch):
    tables.write(on_an_h200, tables.IMPLEMENTATIONS, [measured("triton:passes", "aten")])
    module = layer(dk.LoRA(r=4), torch.float64)
    assert module(torch.randn(3, 24, dtype=torch.float64)).dtype == torch.float64
    explained = dk.explain(module, 3)
    assert explained.forward.impl == "aten" and "float64" in explained.forward.why


def test_measured_times_give_the_runner_up(on_an_h200):
    relative = {"aten": 1.2, "triton:passes": 1.0}
    entry = measured("triton:passes", "triton:passes")
    entry["measured"] = MEASURED | {"relative": {"forward": relative, "backward": relative}}
    tables.write(on_an_h200, tables.IMPLEMENTATIONS, [entry])
    explained = dk.explain(layer(dk.LoRA(r=4)), 16, "H200")
    impl, seconds = explained.forward.runner_up
    assert impl == "aten" and seconds == pytest.approx(1.2 * explained.forward.seconds)


VARIANTS = [
    {}, {"r": 16}, {"r": 16, "adapter": 4}, {"in_scale": True, "out_scale": True},
    {"r": 16, "out_scale": True}, {"r": 16, "in_scale": True}, {"r": 16, "dropout": True},
    {"r": 16, "adapter": 4, "dropout": True}, {"addend": True}, {"addend": True, "r": 3},
    {"r": 16, "element": 4, "adapter": 4},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_composition_computes_and_moves_what_the_model_says(variant):
    t = Terms(2048, 1024, 1536, **variant)
    narrow = {2: torch.bfloat16, 4: torch.float32}

    def meta(*size, element=t.element):
        return torch.empty(*size, dtype=narrow[element], device="meta")

    x, weight, dy = meta(t.M, t.K), meta(t.N, t.K), meta(t.M, t.N)
    down = meta(t.r, t.K, element=t.adapter) if t.r else None
    up = meta(t.N, t.r, element=t.adapter) if t.r else None
    in_scale = meta(t.K, element=4) if t.in_scale else None
    out_scale = meta(t.N, element=4) if t.out_scale else None
    addend = meta(t.M, t.N) if t.addend else None
    seed = torch.empty((), dtype=torch.int64, device="meta") if t.dropout else None
    options = (seed, 1.0, 0.1 if t.dropout else 0.0, "identity")
    with _Counting() as forward:
        _, kept, z = aten.forward(
            x, weight, None, down, up, None, in_scale, out_scale, addend, *options, t.out_scale
        )
    branch = bool(t.r)
    needs = (True, False, False, branch, branch, False, t.in_scale, t.out_scale, False)
    with _Counting() as backward:
        aten.backward(
            dy, x, weight, None, down, up, None, in_scale, out_scale, kept, z, *options, needs
        )
    for counted, steps in (
        (forward, roofline.forward(t, "aten")),
        (backward, roofline.backward(t, "aten")),
    ):
        flops, moved = roofline.total(steps)
        assert flops == counted.flops
        assert moved == pytest.approx(counted.bytes, rel=0.08)


def test_the_roofline_of_a_known_case():
    """4096 x 4096, 8192 tokens, bf16 on an H200: two GEMMs of 274.9 GFLOP at 790 TFLOP/s."""
    gpu = GPUS["H200"]
    frozen = Terms(8192, 4096, 4096)
    steps = roofline.forward(frozen, "aten") + roofline.backward(frozen, "aten")
    base = roofline.seconds(steps, gpu)
    assert base == pytest.approx(2 * 2 * 8192 * 4096 * 4096 / 790e12)
    lora = Terms(8192, 4096, 4096, r=16)

    def over_frozen(impl):
        steps = roofline.forward(lora, impl) + roofline.backward(lora, impl)
        return roofline.seconds(steps, gpu) / base

    # Moved beside the GEMMs: x twice, dy once, at 4.3 TB/s, is 6.7 % of 0.696 ms; library calls
    # also write and read the branch's part of y and of dx, and read dy twice.
    assert 1.067 < over_frozen("triton:fused") < 1.09
    assert over_frozen("triton:fused") < over_frozen("triton:passes") < over_frozen("aten") < 1.14


@pytest.mark.parametrize("name", dk.methods())
def test_every_method_is_explained(name):
    method = dk.methods()[name].small()
    module = layer(method)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    explained = dk.explain(module, tokens=64, device="A100")
    assert explained.forward.impl == explained.backward.impl == "aten"
    assert explained.forward.flops >= 2 * 64 * 24 * 20
    assert explained.forward.seconds > 0 and 0 < explained.forward.share_of_roof <= 1.0001
    if set(dispatch.TRITON_FORMS) <= set(method.impls):
        assert explained.backward.runner_up[0] in dispatch.CANDIDATES[1:]
    else:
        assert explained.forward.runner_up is None and "runner-up" not in str(explained)
    text = str(explained)
    assert type(method).__name__ in text and "A100 (sm_80)" in text
    assert json.dumps(explained.as_dict())
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_states_of_a_layer():
    module = layer(dk.LoRA(r=4))
    assert dk.explain(module, 4, training=False).backward is None
    with dk.disable(nn.Sequential(module)):
        assert dk.explain(module, 4, "H200").forward.flops == 2 * 4 * 24 * 20
    dk.merge(nn.Sequential(module))
    merged = dk.explain(module, 4, "H200")
    assert merged.forward.impl == "nn.Linear"
    assert "its adapter 'default' is merged" in str(merged)


def test_a_trained_weight_is_one_more_gemm():
    """Diff pruning trains W + difference: its backward has dW beside dx."""
    module = layer(dk.methods()["diff_pruning"]())
    explained = dk.explain(module, 1000, "H200")
    assert explained.backward.flops == 2 * explained.forward.flops
    assert "dW" in [step.name for step in explained.backward.steps]


def test_a_method_without_a_triton_form_is_explained_without_one(monkeypatch):
    for name in ("lokr", "series_adapter"):
        method = dk.methods()[name]
        with pytest.raises(ValueError, match="has no triton:fused form: impl must be one of auto"):
            method(impl="triton:fused")
        assert dk.explain(layer(method.small()), 64, "H200").forward.runner_up is None
        module = layer(method.small())
        monkeypatch.setenv(dispatch.VARIABLE, "triton:fused")
        with pytest.raises(RuntimeError, match="DECOMP_KERNELS_IMPL names it: unset it"):
            dk.explain(module, 64, "H200")
        monkeypatch.delenv(dispatch.VARIABLE)


def test_dora_is_made_on_any_device_for_any_form(monkeypatch):
    """Where its Triton form cannot run yet, the first norm is the library's."""
    monkeypatch.setenv(dispatch.INTERPRET, "0")
    for form in dispatch.TRITON_FORMS:
        module = layer(dk.DoRA(r=4, impl=form))
        norms = torch.linalg.vector_norm(module.weight, dim=1)
        torch.testing.assert_close(module.adapters["default"].magnitude, norms)
        assert dk.explain(module, 8, "H200").forward.impl == form
        with torch.device("meta"):
            assert layer(dk.DoRA(r=4, impl=form)).weight.is_meta
    with torch.inference_mode():
        assert dk.explain(layer(dk.DoRA(r=4)), 8, "H200").forward.impl == "aten"


def test_what_it_refuses():
    with pytest.raises(TypeError, match="layer must be an adapted linear, got Linear; take one"):
        dk.explain(nn.Linear(2, 2), 4)
    assert dk.explain(layer(dk.SSB()), torch.tensor(4), "rtx 4090").device == "RTX 4090 (sm_89)"
    for tokens in (0, -1, 2.5, True, "4"):
        with pytest.raises(ValueError, match="tokens must be a whole number of at least 1"):
            dk.explain(layer(dk.SSB()), tokens)
    with pytest.raises(ValueError, match="device must be one of H200, H100, A100, RTX 4090, B200"):
        dk.explain(layer(dk.SSB()), 4, "TPU")
    meta = dk.DecomposedLinear(nn.Linear(4, 4, device="meta"), dk.SSB())
    with pytest.raises(RuntimeError, match="has no values yet"):
        dk.explain(meta, 4)


def test_the_command(capsys):
    words = ["explain", "--method", "dora", "-O", "r=16", "--shape", "8192,4096,4096"]
    assert main([*words, "--device", "H200"]) == 0
    out = capsys.readouterr().out
    assert "DoRA(" in out and "H200 (sm_90)" in out and "of the roof" in out
    assert main([*words, "--device", "H200", "--inference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backward"] is None and found["forward"]["impl"] == "aten"
    assert set(found["forward"]["steps"][0]) == {"name", "flops", "bytes", "wide"}
    assert found["forward"]["runner_up"]["impl"] in dispatch.CANDIDATES[1:]
    named = [*words, "-O", "impl=triton:fused", "--device", "H200"]
    assert main(named) == 0 and "named by impl='triton:fused'" in capsys.readouterr().out
    for wrong, message in (
        (["--method", "nothing"], "method must be one of"),
        (["--method", "lora", "-O", "rr=3"], "has no option 'rr'"),
        (["--device", "abacus"], "device must be one of"),
        (["--shape", "1,2"], "three positive numbers"),
    ):
        with pytest.raises(SystemExit) if "--shape" in wrong else _nothing():
            assert main(["explain", *wrong]) == 2
        assert message in capsys.readouterr().err


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_a_users_table_is_checked_and_a_stale_one_is_left(on_an_h200):
    path = tables.write(on_an_h200, tables.IMPLEMENTATIONS, [measured("triton:passes", "aten")])
    whole = json.loads(path.read_text())
    assert tables.entries(tables.IMPLEMENTATIONS)[0]["measured"] == MEASURED
    tables.write(on_an_h200, tables.IMPLEMENTATIONS, [measured("aten", "aten")])
    assert len(json.loads(path.read_text())["entries"]) == 1  # replaced: for the same calls
    path.write_text(json.dumps(whole | {"beside": "another"}))
    forget()
    with pytest.warns(UserWarning, match="made for another version"):
        assert tables.entries(tables.IMPLEMENTATIONS) == tables.shipped(tables.IMPLEMENTATIONS)
    good = whole["entries"][0]
    edits = [
        {"forward": "bogus"}, {"forward": "auto"}, {"measured": True}, {"when": {"M": 5}},
        {"when": {"M_max": "16"}}, {"when": {"Q_max": 5}}, {"measured": {"on": "H200"}},
        {"measured": MEASURED | {"relative": {"forward": {"aten": 1.0}, "backward": {}}}},
    ]  # fmt: skip
    damaged = [json.dumps(whole | {"entries": [good | edit]}) for edit in edits]
    damaged.append(json.dumps(whole | {"entries": [{**good, "backward": None}]}))
    for text in (
        *damaged,
        "{",
        "[]",
        json.dumps(whole | {"entries": [{}]}),
        json.dumps({"entries": []}),
    ):
        path.write_text(text)
        forget()
        with pytest.raises(ValueError, match="run `decomp-kernels tune` again"):
            tables.entries(tables.IMPLEMENTATIONS)


def test_a_users_tile_is_checked(on_an_h200):
    now = tables.shipped("up_expansion")[0]["config"]
    entry = {"arch": "any", "when": {}, "config": now, "measured": MEASURED}
    path = tables.write(on_an_h200, "up_expansion", [entry])
    whole = json.loads(path.read_text())
    assert tables.entries("up_expansion")[0] == entry
    short = {name: size for name, size in now.items() if name != "BLOCK_C"}
    for config in (
        short, [], {**now, "BLOCK_M": 17}, {**now, "BLOCK_M": 0}, {**now, "BLOCK_M": "a"},
        {**now, "other": 1},
    ):  # fmt: skip
        path.write_text(json.dumps(whole | {"entries": [entry | {"config": config}]}))
        forget()
        with pytest.raises(ValueError, match="up_expansion.json must be a table that"):
            tables.entries("up_expansion")


def test_info_says_what_is_wrong_with_the_environment(monkeypatch, capsys):
    monkeypatch.setenv(dispatch.VARIABLE, "bogus")
    assert main(["info"]) == 0
    assert "DECOMP_KERNELS_IMPL must be one of" in capsys.readouterr().out
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert main(["info"]) == 0 and "auto on the CPU: " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["tune", "--dry"], ["bench", "layer", "--quick"]], ids=str)
def test_a_results_file_that_cannot_be_is_said_before_any_work(words, tmp_path, capsys):
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
