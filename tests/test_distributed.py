"""Training on 2 and 3 gloo processes is training in one process on all data; and what is kept.

The processes run tests/distributed_worker.py; what they found is looked at here, case by case.
"""

import json
import os
import time
from pathlib import Path

import pytest
import ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import decomp_kernels as dk

LINEARS, TARGETED, STEPS = 28, 12, 3  # of the Llama in distributed_model.py

EVERYDAY = {
    2: """alone-lora ddp-lora ddp-dora ddp-ssb
        fsdp-blocks-lora fsdp-blocks-dora fsdp-blocks-ssb fsdp-blocks-vera fsdp-layers-dora
        fsdp-adapters-lora fsdp-adapters-dora fsdp-adapters-ssb
        checkpointed-blocks-dora checkpointed-adapters-lora mixed-blocks-lora mixed-adapters-dora
        bf16_base-lora files quantised files_of_ddp refused reloaded checkpoint dropout
        tensor-lora tensor-dora tensor-with-fsdp tensor-refused
        peft-blocks-lora peft-leaves-dora peft-tensor_parallel-lora
        uneven-lora uneven-dora uneven-ssb uneven-ssl uneven-ia3""",
    3: """alone-dora alone_in_bf16-dora ddp-lora ddp-dora
        fsdp-blocks-lora fsdp-blocks-dora fsdp-blocks-ssb fsdp-adapters-dora
        checkpointed-blocks-lora mixed-blocks-dora bf16_base-dora
        files quantised reloaded checkpoint tensor-ssb tensor-ia3
        peft-ddp-dora peft-blocks-dora peft-leaves-lora
        uneven-lora uneven-dora uneven-ssb uneven-ssl uneven-ia3""",
}
CASES = {world: names.split() for world, names in EVERYDAY.items()}


def launch(world: int, folder: Path, names: list[str]) -> dict[str, list[dict]]:
    """{case: what each rank found}."""
    lines = ranks.results("distributed_worker.py", world, folder, ",".join(names))[0]
    return {line["case"]: line["ranks"] for line in lines}


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, dict]:
    """{number of ranks: {case: ...}}, from one start of each group in the whole test run.

    The first of pytest-xdist's processes that comes here makes the folder, and the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder, done = shared / "distributed", shared / "distributed" / "results.json"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.5)
        return json.loads(done.read_text())
    found: dict[str, dict] = {}
    try:
        for world, names in CASES.items():
            found[str(world)] = launch(world, folder, names)
    finally:
        (folder / "unfinished").write_text(json.dumps(found))
        (folder / "unfinished").rename(done)
    return found


def check(case: str, world: int, found_by: list[dict]) -> None:
    assert len(found_by) == world
    for rank, found in enumerate(found_by):
        assert "raised" not in found, found["raised"]
        CHECKS[case.partition("-")[0]](case, world, rank, found)


def alone(case, world, rank, found):
    assert found["wrong"] == found["parameters"] > 0, "a control that the check does not see"
    assert found["difference"] > 1e-2


def alone_in_bf16(case, world, rank, found):
    """Rounding hides some tensors' differences, and not most."""
    assert found["wrong"] > found["parameters"] / 2
    assert found["difference"] > 1e-2


def one_process(case, world, rank, found):
    """Within the policy of decomp_kernels.testing, every parameter moved, and all of it fused."""
    assert found["wrong"] == 0, found["first"]
    assert found["parameters"] > 0 and found["moved"] > 1e-3 and found["gradients"]


def ddp(case, world, rank, found):
    one_process(case, world, rank, found)
    assert found["calls"] == TARGETED * STEPS
    assert found["sharded"] == 0


def fsdp(case, world, rank, found):
    one_process(case, world, rank, found)
    again = 2 if case.startswith("checkpointed") else 1
    assert found["calls"] == TARGETED * STEPS * again
    whole = 2 if case.endswith("vera") else 0  # the projections, left out of the units
    assert found["sharded"] == found["all"] - whole > 0
    assert found["held"] < 1.2 / world
    if case.startswith("bf16_base"):
        assert found["dtypes"] == ["torch.bfloat16", "torch.float32"]


def files(case, world, rank, found):
    assert found["gathered"], "no block was left in bf16: the case shows nothing"
    assert found["adds"] > 0.1
    assert found["loaded"] == 0
    assert found["written"] == (rank == 0)
    assert found["state"] == 0


def quantised(case, world, rank, found):
    for kind, codes in (("nf4", "torch.uint8"), ("int8", "torch.int8")):
        assert found[f"{kind} codes"] == codes
        assert found[f"{kind} wrong"] < 1e-4
        assert found[f"{kind} loaded"] < 1e-4


def files_of_ddp(case, world, rank, found):
    assert found["loaded"] == 0


def refused(case, world, rank, found):
    *before, forward = found["said"]
    doing = ("adding an adapter", "adding an adapter", "merging", "removing adapters", "quantising")
    for said, what in zip(before, doing, strict=True):
        assert f"{what} must come before fully_shard" in said
    assert "outermost fully_shard" in forward
    assert found["changed"] == 0


def reloaded(case, world, rank, found):
    for cached in (False, True):
        assert found[f"changed-{cached}"] > 0.1
        assert found[f"wrong-{cached}"] < 1e-4
        assert found[f"forgotten-{cached}"]


def checkpoint(case, world, rank, found):
    assert found["moved"] > 0.01
    assert found["wrong"] < 1e-4  # AdamW divides by gradients near 0
    if world == 3:
        assert found["single"] < 1e-4


def dropout(case, world, rank, found):
    assert found["checkpointed"] == 0
    assert found["effect"] > 1e-2
    assert found["own_seeds"] > 1e-2
    assert found["one_seed"] == 0


def tensor(case, world, rank, found):
    if case == "tensor-refused":
        norms, branch, method, base = found["said"]
        assert "row norms go over the columns of all ranks" in norms
        assert "relu in its branch" in branch
        assert "adapters of dora, ia3, lora, ssb, ssl" in method
        assert "quantised weight, which tensor parallel cannot split" in base
        return
    assert found["wrong"] == 0, found["first"]
    assert found["moved"] > 1e-3
    assert found["calls"] == LINEARS * STEPS
    assert found["sharded"] == found["parameters"] > found["split"] - 1 > 0
    assert found["reduced"]
    assert found["loaded"] == 0
    assert found["output"] < 1e-3


def uneven(case, world, rank, found):
    assert found["worst"] < 1e-12
    assert found["smallest"] > 1


def peft(case, world, rank, found):
    """Fused under DDP and in blocks; else PEFT's own forward, which the report names."""
    assert found["wrong"] == 0, found["first"]
    assert found["moved"] > 1e-3
    assert (found["sharded"] > 0) == ("ddp" not in case)
    if "ddp" in case or "blocks" in case:
        assert (found["calls"], found["own"]) == (TARGETED * STEPS, 0)
    else:
        assert (found["calls"], found["own"]) == (0, TARGETED)
        assert "FSDPLinear" in found["report"] or "DTensor" in found["report"]


CHECKS = {
    "peft": peft,
    "alone": alone,
    "alone_in_bf16": alone_in_bf16,
    "ddp": ddp,
    "fsdp": fsdp,
    "checkpointed": fsdp,
    "mixed": fsdp,
    "bf16_base": fsdp,
    "files": files,
    "quantised": quantised,
    "files_of_ddp": files_of_ddp,
    "refused": refused,
    "reloaded": reloaded,
    "checkpoint": checkpoint,
    "dropout": dropout,
    "tensor": tensor,
    "uneven": uneven,
}


@pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, names in CASES.items() for case in names]
)
def test_case(world, case, results):
    assert case in results.get(str(world), {}), "the processes failed before it"
    check(case, world, results[str(world)][case])


@pytest.mark.full
def test_every_case(tmp_path):
    for world in CASES:
        found = launch(world, tmp_path, ["all"])
        assert len(found) > 50
        for case, found_by in found.items():
            check(case, world, found_by)


def test_fsdp1_is_refused():
    """Which cannot be built on a CPU: a shell of its class is what is looked at."""
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), flat)
    for attempt in (lambda: dk.save_adapter(model, "nowhere"), lambda: dk.adapt(model, dk.LoRA())):
        with pytest.raises(RuntimeError, match="FSDP1"):
            attempt()
