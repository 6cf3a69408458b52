"""Trainer, SFTTrainer, Lightning and accelerate launch, each in a process of its own.

The scripts in tests/trainers/ train a tiny Llama and print what they saw; each says what its cases
are.  All distances are the largest difference of any trained number.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "trainers"
ROUNDING = 1e-6  # of a few AdamW steps in float32, on numbers below 1 that move by 1e-2


def _run(script: str, *, launcher: tuple[str, ...] = ()) -> dict:
    done = _python(*launcher, str(SCRIPTS / script), folder=ROOT)
    return json.loads([line for line in done.splitlines() if line.startswith('{"')][-1])


def _python(*arguments: str, folder: Path) -> str:
    """What it prints, on one thread, without a GPU and without a network."""
    pytest.importorskip("transformers")
    path = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [path])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, env=environment, timeout=600, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _check_learned(found: dict, fall: float) -> None:
    """The loss fell, every trained parameter moved and is finite, the base has the same bits."""
    losses = found["losses"]
    assert losses[-1] < losses[0] - fall, losses
    assert found["unmoved"] == []
    assert found["base_changed"] == 0.0


def _check_resumed(found: dict) -> None:
    """Exactly the uninterrupted run, which another start would not have been."""
    assert found["adapter"] == 0.0
    before, after = found["losses"]
    assert len(after) >= 3
    assert before == after
    assert found.get("another_start", 1.0) > 0.01


def test_trainer_on_adapted_models():
    found = _run("with_trainer.py")
    _check_training(found)
    _check_exact_resuming(found["resumed"])
    _check_callbacks(found)
    _check_saving(found["saving"])


def _check_training(found: dict) -> None:
    _check_learned(found["learning"], fall=2.0)
    assert found["learning"]["trained"] == 29

    checkpointing = found["checkpointing"]
    assert [checkpointing[f"{name}_checkpointed"] for name in ("none", "reentrant", "not")] == [
        False, True, True
    ]  # fmt: skip
    assert checkpointing["reentrant"] == checkpointing["not"] == 0.0
    assert checkpointing["dropout_matters"] > 1e-3

    # What CheckGradientsCallback is for: 28 of 29 parameters keep their start, and nothing is said.
    silent = found["silent"]
    assert (silent["stuck"], silent["trained"]) == (28, 29)
    assert "28 of 29 trained parameters got no gradient" in silent["said"]
    assert "enable_input_require_grads" in silent["said"]

    assert found["accumulation"]["difference"] < ROUNDING
    assert found["accumulation"]["moved"] > 1e-2

    autocast = found["autocast"]
    assert autocast["dtypes"] == ["torch.bfloat16"]
    assert autocast["kept"] == ["torch.float32"]
    assert autocast["against_a_loop"] < ROUNDING
    assert autocast["against_float32"] > 100 * ROUNDING
    assert autocast["unmoved"] == []


def _check_exact_resuming(found: dict) -> None:
    for name in ("lora", "adalora"):
        _check_resumed(found[name])
        assert found[name]["with_the_trainers_own_restoring"] == 0.0
    assert sum(found["adalora"]["ranks"]) == 2 * 14  # target_r = 2 on each of 14 layers ...
    assert len(set(found["adalora"]["ranks"])) > 1  # ... in the mean
    assert "holds no state of RankAllocatorCallback" in found["adalora"]["without"]


def _check_callbacks(found: dict) -> None:
    """They do what a loop does."""
    allocator = found["allocator"]
    assert allocator["difference"] < ROUNDING
    assert allocator["without"] > 1e-2
    assert allocator["same_ranks"]
    assert sum(allocator["ranks"]) == 2 * 14
    assert len(set(allocator["ranks"])) > 1
    assert "total_step must be above tinit + tfinal = 3" in allocator["said"]

    directions = found["directions"]
    assert (directions["selected_at_2"], directions["selected_at_4"]) == ([False], [True])
    assert directions["resumed_at_2"] == directions["resumed_at_4"] == 0.0
    assert directions["difference"] < ROUNDING
    assert directions["directions_trained"]
    assert "after_steps must be below the 6 steps" in directions["said"][0]
    assert "must have an active LoRADash adapter" in directions["said"][1]
    assert "whole number from 1 on, got 1.5" in directions["said"][2]

    assert found["mpc"]["difference"] < ROUNDING
    assert found["mpc"]["without"] > 1e-2
    assert "call decomp_kernels.adapt" in found["mpc"]["said"]

    events = found["events"]
    assert events["scaled"] < ROUNDING
    assert events["matrices"] == 2 * 14
    assert events["seen"] == [0, 3 * 14]  # nothing of a step that a gradient scaler skipped
    assert ["FSDP" in events["said"][0], "DEEPSPEED" in events["said"][1]] == [True, True]
    assert "no adapter to save" in events["said"][2]  # before the training, not after it


def _check_saving(found: dict) -> None:
    """The Trainer the whole model, the callback the adapter; load_best_model_at_end.

    With tied weights, VeRA's shared tensors and a trained head, whose copy has another name.
    """
    assert set(found) == {"lora", "tied", "vera", "head"}
    for name, saved in found.items():
        assert saved["moved"] > 0.1, name
        assert saved["unexpected"] == saved["missing"] == [], name
        assert saved["whole"] == saved["adapter"] == saved["best_adapter"] == 0.0, name
        assert saved["bytes"][0] < saved["bytes"][1] / 2, name
        assert (saved["base"] == 0.0) == (name != "head"), name
        if saved["best"] != "checkpoint-6":
            assert saved["last_adapter"] > 1e-2, name
    assert any(saved["best"] != "checkpoint-6" for saved in found.values())


def test_trainer_on_accelerated_peft_models():
    """Held to PEFT's own errors inside the script; every forward is the fused one."""
    found = _run("with_accelerated.py")
    for name in ("lora", "dora"):
        learned = found["learning"][name]
        _check_learned(learned, fall=0.01)
        assert learned["losses"] == pytest.approx(learned["theirs"], abs=ROUNDING)
        assert (learned["fused"], learned["others"]) == (8, 0)
    for name in ("reentrant", "not"):
        resumed = found["resumed"][name]
        _check_resumed(resumed)
        assert resumed["loaded"] < ROUNDING  # PEFT's own forward of what was saved
        assert resumed["moved"] > 0.1
        assert (resumed["fused"], resumed["others"]) == (8, 0)
    assert found["resumed"]["without_checkpointing"] == 0.0
    assert (found["autocast"]["fused"], found["autocast"]["others"]) == (8, 0)
    assert 0 < found["autocast"]["apart"] < found["autocast"]["moved"] / 50


def test_sft_trainer():
    pytest.importorskip("trl")
    found = _run("with_trl.py")
    for learned in found["learning"].values():
        _check_learned(learned, fall=1.5)
        assert learned["checkpointing"]
        assert learned["trained"] == 29
    _check_resumed(found["resumed"])
    for learned in found["accelerated"].values():
        _check_learned(learned, fall=0.05)
        assert learned["fused"] == learned["layers"] == 4

    # The fused head reads lm_head.weight: an adapter there is left out, and the callback says so.
    head = found["head"]
    assert head["copy_unmoved"] == []
    assert head["adapter_unmoved"] == [f"lm_head.adapters.default.{t}" for t in ("down", "up")]
    assert "lm_head.adapters.default.down" in head["said"]


def test_lightning():
    pytest.importorskip("lightning")
    found = _run("with_lightning.py")
    _check_learned(found["learning"], fall=2.0)
    _check_resumed(found["resumed"])
    assert found["resumed"]["loaded"] == 0.0
    assert found["resumed"]["moved"] > 0.1


def test_accelerate_launch():
    """Two processes of four rows are one of eight; without averaging they are not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", port)  # fmt: skip
    found = _run("with_launch.py", launcher=command)
    loop, callbacks = found["own_loop"], found["callbacks"]
    assert loop["processes"] == callbacks["processes"] == 2
    assert loop["synced"] < ROUNDING
    assert loop["not_synced"] > 1e-2
    assert loop["moved"] > 1e-2
    assert callbacks["with"] < ROUNDING
    assert callbacks["without"] > 1e-2
    assert callbacks["between_processes"] == 0.0
    assert callbacks["ranks_between_processes"]
    assert callbacks["same_ranks"]
    assert callbacks["kept"] == 2 * 14


def test_the_document_runs_as_written(tmp_path):
    pytest.importorskip("lightning")
    text = (ROOT / "docs" / "trainers.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 5
    (tmp_path / "document.py").write_text("\n".join(blocks), "utf-8")
    said = _python("document.py", folder=tmp_path)
    assert len(re.findall(r": accelerated, \d+ fused$", said, re.M)) == 4
    for folder in ("run/adapter", "run/checkpoint-2/adapter", "run/lightning"):
        assert (tmp_path / folder / "adapter.json").is_file()
