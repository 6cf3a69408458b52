"""One rank of DeepSpeed ZeRO-3:  python zero3_worker.py RANK WORLD FOLDER PORT"""

import json
import os
import sys
from pathlib import Path

import torch


def main(rank: int, world: int, folder: Path, port: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed
    from distributed_cases import METHODS, reference
    from distributed_model import RATE, SEQUENCES, Calls, adapted, llama, loss_of, trained, values

    import decomp_kernels as dk
    from decomp_kernels.sharding import is_sharded

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    zero = {  # nothing stays gathered
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
    }  # fmt: skip
    config = {
        "train_batch_size": SEQUENCES, "gradient_clipping": 0.0, "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": SEQUENCES // world, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    for name in ("lora", "dora", "ssb"):
        model = adapted(METHODS[name])
        optimizer = torch.optim.SGD(trained(model).values(), lr=RATE)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        parameters = list(model.parameters())
        sharded = sum(map(is_sharded, parameters))
        with Calls() as calls:
            for _ in range(3):
                engine.backward(loss_of(engine, rank, world))
                engine.step()
        dk.save_adapter(model, folder / name)
        torch.distributed.barrier()
        loaded, now = values(dk.load_adapter(llama(), folder / name)), values(model)
        found = reference(name).compare(now) | {
            "method": name,
            "calls": calls.count,
            "sharded": sharded,
            "all": len(parameters),
            "loaded": all(torch.equal(loaded[key], now[key]) for key in now),
        }
        print(f"RESULT {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
