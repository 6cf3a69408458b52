"""One rank of a group of gloo processes: runs cases, rank 0 prints what all ranks have found.

    python distributed_worker.py RANK WORLD FOLDER CASE,CASE,...      "all": every case

One start for many cases: importing takes longer than they do.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch
from distributed_cases import CASES as DATA
from distributed_peft_cases import CASES as PEFT
from distributed_state_cases import CASES as STATE
from distributed_tensor_cases import CASES as TENSOR
from torch import distributed

CASES = {**DATA, **STATE, **TENSOR, **PEFT}


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world
    )
    for name in CASES if names == ["all"] else names:
        started = time.perf_counter()
        try:
            found = CASES[name](rank, world, folder)
        except Exception:
            found = {"raised": traceback.format_exc()}
        gathered: list = [None] * world
        distributed.all_gather_object(gathered, found)
        if rank == 0:
            line = {"case": name, "ranks": gathered, "seconds": time.perf_counter() - started}
            print(f"RESULT {json.dumps(line)}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(","))
