"""A script started once for each rank of a group of processes on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def results(script: str, world: int, folder: Path, *arguments: str) -> list[list[dict]]:
    """What each rank has printed as ``RESULT {json}``; raises with the logs where one has failed.

    The script is called as  script RANK WORLD FOLDER *arguments.
    """
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    logs = [folder / f"log-{world}-{rank}" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, HERE / script, str(rank), str(world), folder, *arguments]
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [log.read_text() for log in logs]
    assert codes == [0] * world, "\n".join(text[-2000:] for text in texts)
    return [[json.loads(line) for line in re.findall(r"^RESULT (.*)$", t, re.M)] for t in texts]
