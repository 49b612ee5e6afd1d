"""What the machine offers: cores, devices, number types."""

import os

import torch

from fastidmm.decode import num_cores
from fastidmm.errors import UsageError


def cpu_threads() -> int:
    """Threads for one operation on the CPU: all cores but the one that renders the next batch."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, num_cores() - 1)


def device_of(name: str) -> torch.device:
    """The device a recipe names; `auto` is the first GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:NUMBER.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has no such GPU; --device cpu works.")
    return device


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What autocast computes in: `auto` is bf16 on a GPU and fp32 on a CPU."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32
