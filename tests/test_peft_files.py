"""PEFT's adapter files both ways: what we write PEFT loads, what it writes we load."""

import dataclasses

import peft
import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from peft_folders import CASES, Net, config_of, inputs, ours, state, tensors_of, theirs

import decomp_kernels as dk
from decomp_kernels.testing import relative_error

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def table(tensors):
    return {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}


def once(keys):
    """Without what bias="all" makes PEFT write three times."""
    return {k: v for k, v in keys.items() if ".original_module." not in k
            and ".modules_to_save." not in k}  # fmt: skip


@every_case
def test_ours_to_peft_and_back(name, tmp_path):
    case, x = CASES[name], inputs()
    model = ours(case)
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3  # it moves the output
    dk.save_adapter(model, tmp_path / "ours", format="peft")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(loaded(x), y) < 1e-12
    written = once(table(get_peft_model_state_dict(theirs(case))))
    assert table(tensors_of(tmp_path / "ours")) == written
    fields = {field.name for field in dataclasses.fields(getattr(peft, case.config))}
    assert set(config_of(tmp_path / "ours")) <= fields
    loaded.save_pretrained(tmp_path / "peft")
    again = dk.load_adapter(Net(), tmp_path / "peft")
    assert relative_error(again(x), y) < 1e-12
    before, after = state(model), state(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@every_case
def test_peft_to_ours_and_back(name, tmp_path):
    case, x = CASES[name], inputs()
    model = theirs(case)
    y = model(x)
    assert relative_error(Net()(x), y) > 1e-3
    model.save_pretrained(tmp_path / "peft")
    loaded = dk.load_adapter(Net(), tmp_path / "peft")
    assert relative_error(loaded(x), y) < 1e-12
    dk.save_adapter(loaded, tmp_path / "ours", format="peft")
    back, saved = tensors_of(tmp_path / "ours"), once(tensors_of(tmp_path / "peft"))
    assert table(back) == table(saved)
    for key, tensor in saved.items():
        assert torch.equal(back[key], tensor), key
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert relative_error(again(x), y) < 1e-12
