"""The main job on tiny random models: what it writes, what it refuses, how it resumes.

No network and no pretrained weights: a two-layer encoder and a two-layer language model from
configurations, with a home-made tokenizer of sixty words.
"""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import decomp_kernels as dk
from decomp_kernels.bench import formulas, peers, twins
from decomp_kernels.cli import checkpoint, checks, compare, folder, loop
from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.main import main
from decomp_kernels.cli.models import training_mode
from decomp_kernels.cli.retrieval import Retrieval

pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(60)]
STEPS = 12


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{"encoder": folder, "language": folder}."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 32,
    }  # fmt: skip
    made = {
        "encoder": BertModel(BertConfig(**sizes)),
        "language": LlamaForCausalLM(LlamaConfig(**sizes)),
    }
    vocabulary = ["[PAD]", "[UNK]", "<s>", "</s>", *WORDS]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    folders = {}
    for name, model in made.items():
        path = tmp_path_factory.mktemp(name)
        tokenizer = Tokenizer(token_models.WordLevel(numbers, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        ends = {"bos_token": "<s>", "eos_token": "</s>"} if name == "language" else {}
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **ends
        ).save_pretrained(path)
        model.save_pretrained(path)
        folders[name] = path
    return folders


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """{"pairs": JSONL, "text": JSONL, "prompts": CSV}: 60 rows each."""
    path = tmp_path_factory.mktemp("data")
    choose = random.Random(0)
    pairs, texts, prompts = [], [], []
    for number in range(60):
        words = choose.sample(WORDS, 5)
        pairs.append({"query": " ".join(words), "document": " ".join(words[:2]), "other": number})
        texts.append({"text": " ".join(WORDS[(number + i) % 60] for i in range(10))})
        prompts.append((" ".join(words), words[-1]))
    for name, rows in (("pairs", pairs), ("text", texts)):
        lines = "\n\n".join(json.dumps(row) for row in rows)  # empty lines are no rows
        (path / f"{name}.jsonl").write_text(lines)
    with (path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *prompts])
    return {
        "pairs": path / "pairs.jsonl", "text": path / "text.jsonl", "prompts": path / "prompts.csv"
    }  # fmt: skip


@pytest.fixture
def command(models, data, tmp_path):
    """The arguments of a small retrieval job, with what a test adds."""

    def make(*more, output="run", steps=STEPS):
        return [
            "train", "--model", str(models["encoder"]), "--data", str(data["pairs"]), "--threads",
            "1", "--batch-size", "8", "--steps", str(steps), "--rounds", "0", "--output",
            str(tmp_path / output), "--checkpoint-every", "5", *map(str, more),
        ]  # fmt: skip

    return make


def weights(output: Path, label: str) -> dict[str, torch.Tensor]:
    """What the finished run's checkpoint holds: adapters, optimizer state, random generators."""
    return checkpoint.read(output / "checkpoints" / f"{label}.safetensors")[0]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert len(one) > 10
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# What a job gives


def test_a_job_writes_what_it_found(command, tmp_path, capsys):
    more = ["--method", "ssb,lora,dora", "--lr", "0.02"]
    arguments = command(*more)
    arguments[arguments.index("--rounds") + 1] = "2"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "run"
    found = json.loads((output / "metrics.json").read_text())
    assert found["options"]["steps"] == STEPS
    assert found["data"]["train"] == 54
    assert found["data"]["held_out"] == 6
    assert {"python", "torch", "peft"} <= found["versions"].keys()
    assert [method["label"] for method in found["methods"]] == ["ssb", "lora", "dora"]
    for method in found["methods"]:
        assert len(method["history"]["losses"]) == STEPS
        gain, low, high = method["gains"]["recall@10"]
        assert low <= gain <= high
        assert gain == pytest.approx(method["after"]["recall@10"] - found["frozen"]["recall@10"])
        moved = method["agreement"]["moved"]
        assert moved > 100 * method["agreement"]["tolerance"], "the adapter must matter"
        assert method["agreement"]["reloaded"] == 0.0
    kinds = {(row["label"], row["kind"]): row for row in found["compared"]}
    assert {("ssb", "authors' formula"), ("lora", "PEFT"), ("dora", "PEFT")} <= kinds.keys()
    for label in ("ssb", "lora", "dora"):
        peers = [row for (name, kind), row in kinds.items() if name == label and kind != "ours"]
        assert len(peers) == (1 if label == "ssb" else 2)
        for peer in peers:
            assert peer["trainable"] == kinds[label, "ours"]["trainable"]
            assert peer["peak_bytes"] > 0
    for label in ("lora", "dora"):
        row = kinds[label, "PEFT, accelerate()"]
        fused, calls = row["fused"]
        assert fused == calls > 0
        assert len(row["over_peft"]) == 3
    assert "its time over PEFT's: lora" in printed
    for label in ("ssb", "lora", "dora"):
        assert label in printed
        assert label in (output / "results.md").read_text()
        assert (output / "adapters" / label).is_dir()
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_training_reaches_the_loss(command, tmp_path):
    assert main(command("--method", "lora", "--lr", "0.02", steps=40)) == 0
    losses = json.loads((tmp_path / "run/metrics.json").read_text())["methods"][0]["history"][
        "losses"
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("rows", ["text", "prompts"])
def test_a_language_model_learns_text(models, data, tmp_path, rows, capsys):
    arguments = [
        "train", "--model", models["language"], "--data", data[rows], "--threads", "1", "--epochs",
        "4", "--batch-size", "8", "--rounds", "0", "--method", "lora", "--lr", "0.02", "--output",
        tmp_path / "run",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["methods"][0]["after"]["loss"] < found["frozen"]["loss"]
    perplexity = f"{math.exp(found['frozen']['loss']):.2f}"
    assert perplexity in capsys.readouterr().out
    assert len(found["methods"][0]["history"]["losses"]) == 4 * (54 // 8)


def test_the_language_loss_is_that_of_transformers(models):
    """Against the model's own loss, on rows of different lengths."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from decomp_kernels.cli.language import Language

    model = AutoModelForCausalLM.from_pretrained(models["language"])
    tokenizer = AutoTokenizer.from_pretrained(models["language"])
    texts = [("w1 w2 w3 w4", "w5 w6"), ("w7", "w8 w9 w10 w11 w12")]
    task = Language(texts, texts, tokenizer, 32)
    wanted = 0.0
    for prompt, completion in texts:
        given = [2, *tokenizer(prompt)["input_ids"]]
        ids = torch.tensor([[*given, *tokenizer(completion)["input_ids"], 3]])
        labels = ids.clone()
        labels[:, : len(given)] = -100
        count = (labels != -100).sum()
        wanted += model(input_ids=ids, labels=labels).loss * count
    counted = 2 + 1 + 5 + 1
    torch.testing.assert_close(task.loss(model, [0, 1]), wanted / counted)
    assert task.evaluate(model, 1)["loss"].metric == pytest.approx(
        wanted.item() / counted, rel=1e-6
    )


def test_recall_is_a_rank_in_float64(models):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(models["encoder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["encoder"])
    choose = random.Random(1)
    texts = [" ".join(choose.sample(WORDS, choose.randint(2, 9))) for _ in range(40)]
    near = [f"{text} {choose.choice(WORDS)}" for text in texts]
    queries = [near[i] if i % 2 else texts[-i] for i in range(len(texts))]
    held_out = [*zip(queries, texts, strict=True), (texts[1], texts[0])]  # a document twice
    task = Retrieval(held_out, held_out, tokenizer, 32, "mean")
    found = {name: scores.metric for name, scores in task.evaluate(model, 7).items()}

    def embed(text):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(hidden.double().mean(1), dim=-1)[0]

    with torch.no_grad():
        q = torch.stack([embed(query) for query, _ in held_out])
        d = {document: embed(document) for _, document in held_out}
    for k in (1, 10):
        hits = 0
        for query, (_, own) in zip(q, held_out, strict=True):
            better = sum((query @ e >= query @ d[own]).item() for t, e in d.items() if t != own)
            hits += better < k
        assert 0 < hits < len(held_out)
        assert found[f"recall@{k}"] == pytest.approx(hits / len(held_out))


def test_every_method_trains_saves_and_comes_back(command, tmp_path):
    """The whole registry in one job: the checks hold for each, or the exit code is 1."""
    assert main(command("--method", ",".join(dk.methods()), "--lr", "0.01", steps=3)) == 0
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [method["label"] for method in found["methods"]] == list(dk.methods())
    for method in found["methods"]:
        assert method["trainable"] > 0, method["label"]
        assert method["agreement"]["moved"] > 0, method["label"]
        assert method["agreement"]["reloaded"] == 0.0, method["label"]


# Interrupted and resumed


HARD = [
    "--method", "lora", "-O", "dropout=0.2", "--method", "adalora", "-O", "r=4", "-O",
    "target_r=2", "-O", "deltaT=2", "--base-dropout", "--lr", "0.02",
]  # fmt: skip


def test_killed_and_resumed_it_ends_with_the_same_bits(command, tmp_path):
    """kill -9 in the middle of the first method; the run then goes on in another process."""
    steps = 30
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "decomp_kernels.cli.main", *command(*HARD, steps=steps)]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    first = tmp_path / "run/checkpoints/lora.safetensors"
    while not first.exists():
        assert process.poll() is None, "it ended before it wrote a checkpoint"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = len(checkpoint.read(first)[1]["losses"])
    assert 0 < reached < steps
    assert not (tmp_path / "run/metrics.json").exists()

    assert main(command(*HARD, "--resume", steps=steps)) == 0
    assert main(command(*HARD, output="whole", steps=steps)) == 0
    for label in ("lora", "adalora"):
        assert_same_bits(weights(tmp_path / "run", label), weights(tmp_path / "whole", label))
        saved = [
            load_file(file)
            for output in ("run", "whole")
            for file in (tmp_path / output / "adapters" / label).glob("*.safetensors")
        ]
        assert len(saved) == 2
        assert_same_bits(*saved)
    losses = [
        [
            m["history"]["losses"]
            for m in json.loads((tmp_path / o / "metrics.json").read_text())["methods"]
        ]
        for o in ("run", "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(command, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    calls = 0
    loss = Retrieval.loss

    def interrupted(self, model, rows):
        nonlocal calls
        calls += 1
        if calls == STEPS + 4:  # in the second method
            os.kill(os.getpid(), number)
        return loss(self, model, rows)

    monkeypatch.setattr(Retrieval, "loss", interrupted)
    assert main(command(*HARD)) == 128 + number
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped at step 4 of 12 of adalora" in message
    assert "--resume" in message
    assert signal.getsignal(number) == before
    assert len(checkpoint.read(tmp_path / "run/checkpoints/adalora.safetensors")[1]["losses"]) == 4
    monkeypatch.undo()

    assert main(command(*HARD, "--resume")) == 0
    assert main(command(*HARD, output="whole")) == 0
    for label in ("lora", "adalora"):
        assert_same_bits(weights(tmp_path / "run", label), weights(tmp_path / "whole", label))


def test_a_finished_job_resumes_to_the_same_report(command, tmp_path):
    assert main(command("--method", "ssb")) == 0
    first = json.loads((tmp_path / "run/metrics.json").read_text())
    assert main(command("--method", "ssb", "--resume")) == 0
    second = json.loads((tmp_path / "run/metrics.json").read_text())
    assert first["methods"] == second["methods"]


def test_the_order_of_the_data_is_a_function_of_seed_and_step():
    first = [loop.rows_of(step, 50, 8, 3) for step in range(12)]
    assert first[:6] != first[6:]  # a new order each epoch
    for epoch in (first[:6], first[6:]):
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == 48
    assert loop.rows_of(9, 50, 8, 3) == first[9]
    assert loop.rows_of(9, 50, 8, 4) != first[9]


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [loop.rate(step, 100) for step in range(100)]
    assert max(rates) == 1.0 == rates[9]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert all(loop.rate(step, 1) == 1.0 for step in range(1))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, call):
    path = tmp_path / "state.safetensors"
    checkpoint.write(path, {"a": torch.ones(3)}, {"losses": [0.1]})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(BadInput, match=r"cannot write .*No space left"):
        checkpoint.write(path, {"a": torch.zeros(3)}, {"losses": [0.1, 0.2]})
    tensors, facts = checkpoint.read(path)
    assert torch.equal(tensors["a"], torch.ones(3))
    assert facts == {"losses": [0.1]}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    """Killed after the new content is on the disk and before it has its name."""
    path = tmp_path / "state.safetensors"
    checkpoint.write(path, {"a": torch.ones(3)}, {"losses": [0.1]})
    script = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from decomp_kernels.cli import checkpoint\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.write(Path(sys.argv[1]), {'a': torch.zeros(3)}, {'losses': []})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)])
    assert done.returncode == -signal.SIGKILL
    tensors, facts = checkpoint.read(path)
    assert torch.equal(tensors["a"], torch.ones(3))
    assert facts == {"losses": [0.1]}
    checkpoint.write(path, {"a": torch.zeros(3)}, {"losses": []})  # what was left is in no way
    assert torch.equal(checkpoint.read(path)[0]["a"], torch.zeros(3))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_is_refused(command, tmp_path, capsys, damage):
    assert main(command("--method", "lora")) == 0
    path = tmp_path / "run/checkpoints/lora.safetensors"
    content = path.read_bytes()
    changed = {
        "cut": content[:-100],
        "flipped": content[:20] + bytes([content[20] ^ 255]) + content[21:],
        "empty": b"",
    }
    if damage == "other":
        checkpoint.write(path, {"model/x": torch.ones(2)}, {"losses": [1.0], "seconds": [1.0]})
    else:
        path.write_bytes(changed[damage])
    assert main(command("--method", "lora", "--resume")) == 2
    assert "is no checkpoint to go on with" in capsys.readouterr().err


# Resuming something else


def test_resuming_asks_for_the_same_options(command, tmp_path, capsys):
    assert main(command("--method", "ssb")) == 0
    capsys.readouterr()
    for more, said in (
        (["--method", "lora"], "method"),
        (["--method", "ssb", "--seed", "1"], "seed was 0, now it is 1"),
        (["--lr", "0.5", "--method", "ssb"], "lr was null, now it is 0.5"),
    ):
        assert main(command(*more, "--resume")) == 2
        assert said in capsys.readouterr().err
    assert main(command("--method", "ssb", "--resume", output="elsewhere")) == 2
    assert "holds no job" in capsys.readouterr().err


def test_resuming_asks_for_the_same_data(command, data, tmp_path, capsys):
    copied = tmp_path / "pairs.jsonl"
    copied.write_text(data["pairs"].read_text())
    more = ["--method", "ssb", "--data", copied]
    assert main(command(*more)) == 0
    copied.write_text(copied.read_text().replace("w1 ", "w2 "))
    assert main(command(*more, "--resume")) == 2
    assert "data of the interrupted job" in capsys.readouterr().err


def test_another_number_of_threads_is_said(tmp_path, capsys):
    from decomp_kernels.cli.options import TrainOptions

    folder.open_job(tmp_path / "run", TrainOptions(), "0")
    job = json.loads((tmp_path / "run/job.json").read_text())
    job["environment"]["threads"] += 1
    (tmp_path / "run/job.json").write_text(json.dumps(job))
    folder.open_job(tmp_path / "run", TrainOptions(resume=True), "0")
    assert "will not be those of an uninterrupted run" in capsys.readouterr().out


def test_a_job_is_not_written_over_unasked(command, tmp_path, capsys):
    assert main(command("--method", "ssb")) == 0
    assert main(command("--method", "ssb")) == 2
    assert "--overwrite" in capsys.readouterr().err
    keep = tmp_path / "run/notes.txt"
    keep.write_text("mine")
    assert main(command("--method", "lora", "--overwrite")) == 0
    assert keep.read_text() == "mine"
    assert [path.name for path in (tmp_path / "run/adapters").iterdir()] == ["lora"]


def test_a_folder_of_something_else_is_left_alone(command, tmp_path, capsys):
    (tmp_path / "run/adapters").mkdir(parents=True)
    assert main(command("--method", "ssb", "--overwrite")) == 2
    assert "holds files of something else" in capsys.readouterr().err


# The checks can fail


def test_an_adapter_that_comes_back_changed_fails_the_job(command, tmp_path, monkeypatch, capsys):
    load = dk.load_adapter

    def wrong(model, path):
        loaded = load(model, path)
        with torch.no_grad():
            for name, tensor in loaded.named_parameters():
                if name.endswith("in_scale"):
                    tensor.mul_(1.01)
        return loaded

    monkeypatch.setattr(dk, "load_adapter", wrong)
    assert main(command("--method", "ssb", "--lr", "0.02")) == 1
    captured = capsys.readouterr()
    assert "ssb: reloaded or merged outputs differ" in captured.err
    assert "allowed" in captured.out
    assert (tmp_path / "run/metrics.json").exists()


def test_a_wrong_merge_fails_the_job(command, monkeypatch, capsys):
    from decomp_kernels.methods.base import Method

    merged = Method.merged

    def wrong(self, adapter, base):
        weight, bias = merged(self, adapter, base)
        return weight * 1.01, bias

    monkeypatch.setattr(Method, "merged", wrong)
    assert main(command("--method", "lora", "--lr", "0.02")) == 1
    assert "lora" in capsys.readouterr().err


def test_what_cannot_be_merged_is_said_and_is_no_failure(command, tmp_path, capsys):
    assert main(command("--method", "parallel_adapter")) == 0
    assert "not mergeable" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["methods"][0]["agreement"]["merged"] is None


def test_a_loss_that_is_not_finite_stops_the_job(command, monkeypatch, capsys):
    loss = Retrieval.loss
    monkeypatch.setattr(Retrieval, "loss", lambda self, *args: loss(self, *args) * math.nan)
    assert main(command("--method", "lora")) == 2
    assert "the loss is nan at step 1" in capsys.readouterr().err


# Beside the optimizer


def test_adalora_moves_ranks_and_lora_dash_selects(command, tmp_path):
    more = ["--method", "adalora", "-O", "r=4", "-O", "target_r=2", "--method", "lora_dash"]
    assert main(command(*more, "--lr", "0.02")) == 0
    tensors = weights(tmp_path / "run", "adalora")
    masks = torch.cat([t for name, t in tensors.items() if name.startswith("companion/masks/")])
    assert masks.float().mean() == 0.5
    cores = torch.cat([t for name, t in tensors.items() if name.endswith(".core")])
    assert (cores == 0).float().mean() == 0.5
    selected = [
        t for n, t in weights(tmp_path / "run", "lora_dash").items() if n.endswith("selected")
    ]
    assert selected
    assert all(selected)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "lora,ssb", "--mpc", "d"], "--mpc: model must have an active adapter"),
        (["--method", "lora,pissa", "-O", "r=40"], "method pissa: r must be at most"),
        (["--method", "lora", "--target-modules", "nothing"], "matches no module"),
        (["--method", "lora,adalora", "--method", "adalora", "-O", "tinit=99"], "total_step must"),
    ],
)
def test_the_last_method_is_refused_before_the_first_is_trained(
    command, tmp_path, capsys, more, said
):
    assert main(command(*more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not (tmp_path / "run").exists()


def test_the_pattern_constraint_changes_training(command, tmp_path):
    for output, more in (("without", []), ("with", ["--mpc", "d", "--mpc-coef", "0.5"])):
        assert main(command("--method", "lora", "--lr", "0.02", *more, output=output)) == 0
    ends = []
    for output in ("without", "with"):
        tensors = weights(tmp_path / output, "lora")
        downs = [t for n, t in tensors.items() if n.startswith("model/") and n.endswith(".down")]
        ends.append(sum((A @ A.T - torch.eye(len(A))).square().sum().item() for A in downs))
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("base_dropout", [False, True])
def test_the_base_has_dropout_only_where_asked(models, base_dropout):
    """Adapters, ours and PEFT's, always have theirs."""
    from transformers import AutoModel

    base = AutoModel.from_pretrained(models["encoder"])
    ids = torch.arange(4, 20)[None]
    method = dk.LoRA(dropout=0.5)
    names = ["encoder.layer.1.output.dense"]
    ours = dk.adapt(twins.twin(base), method, names)
    peer, _ = twins.peer_of(base, method, names)
    for model in (base, ours, peer):
        training_mode(model, base_dropout)
        one, other = (model(input_ids=ids).last_hidden_state for _ in range(2))
        assert torch.equal(one, other) != base_dropout, "the adapters' branch is 0 at the start"
    with torch.no_grad():
        for name, tensor in [*ours.named_parameters(), *peer.named_parameters()]:
            if name.endswith((".up", "lora_B.default.weight")):
                tensor.normal_()
    for model in (ours, peer):
        training_mode(model, base_dropout)
        one, other = (model(input_ids=ids).last_hidden_state for _ in range(2))
        assert not torch.equal(one, other)


# The pieces of the comparison


def test_twins_share_weights_and_nothing_else():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    twin = twins.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    dk.adapt(twin, dk.SSB())
    assert type(model[0]) is torch.nn.Linear
    before = model[0].weight.clone()
    with torch.no_grad():
        twin[0].adapters["default"].in_scale.add_(0.5)
    dk.merge(twin)
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(twin[0].weight, before)


@pytest.mark.parametrize("name", ["ssb", "lora", "dora"])
def test_a_peer_computes_what_ours_does_at_the_start(models, name):
    """The same outputs, as many trained parameters, and gradients on all of them."""
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(models["encoder"]).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(models["encoder"])
    rows = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    task = Retrieval(rows, rows, tokenizer, 32, "mean")
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]
    method = dk.methods()[name]()
    ours = dk.adapt(twins.twin(base), method, names)
    peer, kind = twins.peer_of(base, method, names)
    assert kind == ("authors' formula" if name == "ssb" else "PEFT")
    trained = [p for p in peer.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )
    torch.testing.assert_close(task.outputs(peer.eval(), 2), task.outputs(ours, 2))
    task.loss(peer, [0, 1]).backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("name", sorted({*peers.CONFIGS, *formulas.FORMULAS}))
def test_a_peer_leaves_the_shared_weights_alone(models, name):
    """PiSSA's initialisation writes to its base; nothing may write to that of the others."""
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(models["encoder"]).eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(models["encoder"])
    rows = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    task = Retrieval(rows, rows, tokenizer, 32, "mean")
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]
    options = {"oft": {"block_size": 8}, "sparse": {"r": 2}}.get(name, {})
    found = twins.peer_of(base, dk.methods()[name](**options), names)
    assert found is not None
    task.loss(found[0], [0, 1]).backward()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_peer_that_peft_refuses_is_said(models, capsys):
    from transformers import AutoModel

    base = AutoModel.from_pretrained(models["encoder"])
    assert compare.peer(base, dk.Sparse(), ["encoder.layer.0.attention.self.query"]) is None
    assert "note: PEFT has no sparse with these options here" in capsys.readouterr().out


def test_peers_of_a_model_with_conv1d():
    """GPT-2 keeps its weights as [in, out]."""
    from transformers import GPT2Config, GPT2Model

    base = GPT2Model(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    base.eval().requires_grad_(False)
    ids = torch.arange(16)[None]
    for method in (dk.SSB(), dk.LoRA()):
        peer, _ = twins.peer_of(base, method, ["h.0.attn.c_attn", "h.0.mlp.c_proj"])
        ours = dk.adapt(twins.twin(base), method, ["h.0.attn.c_attn", "h.0.mlp.c_proj"])
        one, other = (model.eval()(input_ids=ids).last_hidden_state for model in (peer, ours))
        torch.testing.assert_close(one, other)


def test_the_tolerance_of_the_checks_is_the_rounding_of_the_base(models):
    """A wider dtype has far less of it; nothing about it is chosen."""
    from transformers import AutoModel, AutoTokenizer

    base = AutoModel.from_pretrained(models["encoder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["encoder"])
    task = Retrieval([("w1 w2", "w3")], [("w1 w2", "w3")], tokenizer, 32, "mean")
    narrow = checks.rounding(base, task)
    half = checks.rounding(base.to(torch.bfloat16), task)
    assert 1e-9 < narrow < 1e-6
    assert 1e-4 < half < 1e-1
