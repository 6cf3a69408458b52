"""The output folder of a job: begun, gone on with, or begun again; never mixed."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from decomp_kernels.cli.checkpoint import write_json
from decomp_kernels.cli.errors import BadInput
from decomp_kernels.cli.options import TrainOptions

JOB = "job.json"
PARTS = ("adapters", "checkpoints", "metrics.json", "results.md", "losses.png")


def open_job(output: Path, options: TrainOptions, data_sha256: str) -> Path:
    """Make the folder ready; a job that is there is refused, resumed or deleted, as asked."""
    found = _read(output / JOB)
    job = {
        "options": json.loads(json.dumps(options.same_job())),
        "data_sha256": data_sha256,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }
    if options.resume:
        if found is None:
            raise BadInput(f"--resume: {output} holds no job to go on with")
        _same(found, job)
        return output
    if found is not None and not options.overwrite:
        raise BadInput(
            f"{output} holds a job already; go on with it (--resume), begin it again "
            "(--overwrite), or name another --output"
        )
    if found is None and output.is_dir() and any((output / part).exists() for part in PARTS):
        raise BadInput(f"{output} holds files of something else; name another --output")
    try:
        for part in PARTS if found is not None else ():
            path = output / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for part in ("adapters", "checkpoints"):
            (output / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to --output {output}: {error.strerror or error}") from None
    write_json(output / JOB, job)
    return output


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise BadInput(f"{path} is damaged; name another --output") from None


def _same(found: dict[str, Any], job: dict[str, Any]) -> None:
    """The options and data of the interrupted job; another environment is only said."""
    for name, value in job["options"].items():
        before = found["options"].get(name)
        if before != value:
            raise BadInput(
                f"--resume needs the options of the interrupted job: {name.replace('_', '-')} was "
                f"{json.dumps(before)}, now it is {json.dumps(value)}"
            )
    if found["data_sha256"] != job["data_sha256"]:
        raise BadInput("--resume needs the data of the interrupted job, and it has changed")
    for name, value in job["environment"].items():
        before = found["environment"].get(name)
        if before != value:
            print(
                f"note: the job began with {name} {before}, this is {value}: the weights will not "
                "be those of an uninterrupted run bit for bit"
            )
