"""The machine that measured: processor, cores, clocks, memory, load, GPUs and their clocks.

Every entry is left out where the system does not tell it (macOS and Windows tell less), so a reader
takes nothing for granted but cpu, cores, threads, instruction_set, system and gpus.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")
CPUFREQ = Path("/sys/devices/system/cpu")
NVIDIA = {  # nvidia-smi's name of a column: ours, with its unit
    "name": "name",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "power.limit": "power_limit_w",
    "driver_version": "driver",
}


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None  # Windows


LOAD_AT_START = _load()  # of the last minute as this program began: others' work, not ours


def machine() -> dict[str, Any]:
    """Clocks are those of this moment."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    always = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }
    told = {
        "physical_cores": physical_cores(),
        "cpu_mhz": cpu_mhz(),
        "governor": _line(CPUFREQ / "cpu0/cpufreq/scaling_governor"),
        "memory_gib": _memory_gib(),
        "load_at_start": LOAD_AT_START,
        "gpu_state": gpu_state(),
    }
    return always | {name: value for name, value in told.items() if value is not None}


def cpu_model() -> str:
    for line in _text(CPUINFO).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def physical_cores() -> int | None:
    """Cores, counting those with two threads once."""
    found, package = set(), ""
    for line in _text(CPUINFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "physical id":
            package = value.strip()
        elif name.strip() == "core id":
            found.add((package, value.strip()))
    return len(found) or None


def cpu_mhz() -> list[float] | None:
    """The slowest and the fastest core's clock."""
    lines = _text(CPUINFO).splitlines()
    found = [float(line.split(":", 1)[1]) for line in lines if line.startswith("cpu MHz")]
    if not found:  # processors other than x86 have it here alone, in kHz
        files = CPUFREQ.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        found = [int(text) / 1000 for file in files if (text := _line(file))]
    return [round(min(found)), round(max(found))] if found else None


def gpu_state() -> list[dict[str, Any]] | None:
    """Clocks, power limit and driver of each GPU from nvidia-smi, in its order."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    words = [tool, f"--query-gpu={','.join(NVIDIA)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None  # there, and without a driver
    lines = [line.split(", ") for line in done.stdout.splitlines() if line]
    names = NVIDIA.values()
    return [
        {name: _value(name, cell) for name, cell in zip(names, cells, strict=False)}
        for cells in lines
    ]


def _value(name: str, cell: str) -> float | str:
    """A number where it has a unit and is one: "[N/A]" stays as it is."""
    if not name.endswith(("_mhz", "_w")):
        return cell
    try:
        return float(cell)
    except ValueError:
        return cell


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None  # Windows


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _line(path: Path) -> str | None:
    return _text(path).strip() or None
