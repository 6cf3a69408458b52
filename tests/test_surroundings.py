"""Adapted layers inside what surrounds them: fast paths, wrappers, copies, ties, odd linears."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import decomp_kernels as dk


def trained(model):
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
def test_transformer_encoder_layers_use_the_adapter_in_evaluation(whole):
    """Their fast path reads the linears' weights and never calls the modules."""
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    if whole:
        model = nn.TransformerEncoder(model, 2)
    base = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention's own out_proj is reported
        trained(dk.adapt(model, dk.LoRA(r=2)))
    x = torch.randn(2, 5, 16)
    for at_work in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            learned, evaluated = at_work.train()(x), at_work.eval()(x)
        torch.testing.assert_close(evaluated, learned)
        assert (evaluated - base(x)).abs().max() > 1e-2
    dk.remove(model)
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    assert not hooks
    torch.testing.assert_close(model(x), base(x))


def test_a_copy_made_inside_disable_is_not_disabled():
    model = trained(dk.adapt(small(), dk.LoRA(r=2), ["0"], modules_to_save=["2"]))
    x = torch.randn(3, 6)
    adapted = model(x)
    with dk.disable(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert not torch.equal(model(x), adapted)
    for one in copies:
        assert torch.equal(one(x), adapted)


def test_disable_contexts_may_overlap():
    model = trained(dk.adapt(small(), dk.LoRA(r=2)))
    x = torch.randn(3, 6)
    adapted = model(x)
    first, second = dk.disable(model), dk.disable(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(model(x), adapted)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models_save_and_load_as_the_model_inside(wrap, tmp_path):
    model = small()
    base = copy.deepcopy(model)
    trained(dk.adapt(model, dk.LoRA(r=2)))
    dk.save_adapter(wrap(model), tmp_path / "a")
    x = torch.randn(3, 6)
    assert torch.equal(dk.load_adapter(copy.deepcopy(base), tmp_path / "a")(x), model(x))
    wrapped = wrap(copy.deepcopy(base))
    assert dk.load_adapter(wrapped, tmp_path / "a") is wrapped
    assert torch.equal(wrapped(x), model(x))


def test_linears_whose_weight_a_hook_computes_are_reported_and_left():
    model = small()
    nn.utils.spectral_norm(model[0])
    with pytest.warns(UserWarning, match="0: its weight is computed by a hook"):
        dk.adapt(model, dk.LoRA(r=2))
    assert type(model[0]) is nn.Linear
    assert isinstance(model[2], dk.DecomposedLinear)


def test_names_that_match_nothing_beside_others_that_do_are_reported():
    with pytest.warns(UserWarning, match="nope: no module has this name"):
        model = dk.adapt(small(), dk.LoRA(r=2), ["0", "nope"])
    assert "nope: not adapted" in dk.report(model)


def test_merging_a_bias_into_a_layer_without_one_is_said():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    trained(dk.adapt(model, dk.BitFit()))
    with pytest.warns(UserWarning, match="0 had no bias and have one now"):
        dk.merge(model)
    dk.unmerge(model)
    assert model[0].bias is None


def test_a_saved_module_that_is_tied_to_another_is_said():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 5, bias=False))
    model[2].weight = model[0].weight
    with pytest.warns(UserWarning, match=r"0.weight is trained as a copy, and 2.weight"):
        dk.adapt(copy.deepcopy(model), dk.LoRA(r=2), ["1"], modules_to_save=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.adapt(model, dk.LoRA(r=2), ["1"], modules_to_save=["0", "2"])


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"lr": "x"}, {"lr": 1.0, "weight_decay": -0.1}])
def test_optimizer_groups_refuse_what_no_optimizer_should_get(bad):
    with pytest.raises(ValueError, match="must be a number of at least 0, got"):
        dk.param_groups(dk.adapt(small(), dk.LoRA(r=2)), **bad)


def test_options_are_keywords():
    with pytest.raises(TypeError, match=r"LoRA takes its options by name, as in LoRA\(r=8\)"):
        dk.LoRA(8)


@pytest.mark.parametrize("name", sorted(n for n, m in dk.methods().items() if m.small() != m()))
def test_default_options_compile_too(name):
    """The contract suite compiles small instances; defaults may take another way."""
    layer = dk.DecomposedLinear(nn.Linear(64, 64), dk.methods()[name]())
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
