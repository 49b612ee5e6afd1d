"""Where and with what something was measured."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fastidmm
from fastidmm.facts import num_cores, version_of

ROOT = Path(fastidmm.__file__).resolve().parents[1]
PACKAGES = (
    "torch", "torchvision", "timm", "triton", "numpy", "pillow", "kornia", "liger-kernel",
    "cut-cross-entropy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "ffcv",
)  # fmt: skip


def surroundings() -> dict[str, Any]:
    """Versions, commit, machine, date (UTC) and command; what is not there is None."""
    gpu = torch.cuda.is_available()
    return {
        "fastidmm": fastidmm.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _driver() if gpu else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


def commit() -> str | None:
    """The commit of a checkout, "-dirty" behind it where files differ; None where it is none."""
    if not (ROOT / ".git").exists():
        return None
    return _answer("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40",
                   "--exclude=*")  # fmt: skip


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "fastidmm" if name == "__main__.py" else name


def _driver() -> str | None:
    told = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0] if told else None


def _answer(*command: str) -> str | None:
    """What a program prints; None where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    """The processor's name as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
