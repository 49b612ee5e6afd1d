"""What the machine offers: cores, devices, number types."""

import ctypes
import os
import resource
import sys
from contextlib import suppress

import torch

from fastidmm.errors import UsageError
from fastidmm.facts import memory, num_cores
from fastidmm.ranks import world


def cpu_threads() -> int:
    """Threads for one operation on the CPU: one core is left to rendering ahead."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, num_cores() - 1)


def set_up(device_name: str, *, exact: bool) -> torch.device:
    """Make the machine ready for a run, the same for training and evaluation; its device."""
    device = device_of(device_name)
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with it
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # events and streams are of the current device
    torch.set_num_threads(cpu_threads())
    keep_freed_memory()
    if torch.are_deterministic_algorithms_enabled() != exact:  # the call imports torch's compiler
        torch.use_deterministic_algorithms(exact)
    # Its gradients by a single query, as a last block's class token asks, have been NaN on an H200
    # (NVIDIA/cudnn-frontend issue 1072); flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # What is said to be in float32 is: a run by --precision fp32, and every run's losses.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def keep_freed_memory() -> None:
    """Have glibc use freed memory again, not hand it back to the system.

    A batch's views are large: on a CPU it takes the system a third of their time to find, clear and
    map as many pages anew for every step.
    """
    with suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes from which memory is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, free bytes from which they are given back


def available_memory() -> int:
    """Bytes of the host's memory that can be had without swapping, or half of all of them."""
    total, available = memory()
    return total // 2 if available is None else available


def peak_memory() -> int:
    """Bytes of the host's memory that this process has had at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    """What a record calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_of(name: str) -> torch.device:
    """The device a recipe names; `auto` is the first GPU where there is one.

    Each of several ranks has a GPU of its own, by its number on this machine.
    """
    if world().size > 1:
        return _of_a_rank(name, world().local)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:NUMBER.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has no such GPU; choose auto or cpu.")
    return device


def _of_a_rank(name: str, local: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(f"--device {name}: each of several ranks takes a GPU of its own: auto.")
    if local >= (num := torch.cuda.device_count()):
        raise UsageError(
            f"there is no GPU for rank {world().rank}, since this machine has {num}: start as many "
            "ranks as it has, or give --device cpu, by which they share its cores."
        )
    return torch.device("cuda", local)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What autocast computes in: `auto` is bf16 on a GPU, fp16 on one without, fp32 on a CPU."""
    if precision == "auto" and device.type == "cuda":
        # Before Ampere bf16 is imitated, and slow.
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if modern else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
