"""The scripts of docs/distributed.md, run on two processes as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import decomp_kernels as dk

ROOT = Path(__file__).parent.parent
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_recipe(launcher, tmp_path):
    text = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    (script,) = re.findall(rf"^```python {launcher}\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = dict(re.findall(r"^rank (\d) of 2: loss (\d\.\d+)$", done.stdout, re.M))
    assert losses.keys() == {"0", "1"} and losses["0"] != losses["1"], done.stdout

    torch.manual_seed(0)  # the base that the script begins with
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.arange(32).view(2, 16)
    before = model(input_ids=tokens).logits
    after = dk.load_adapter(model, tmp_path / "adapter").eval()(input_ids=tokens).logits
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-2
