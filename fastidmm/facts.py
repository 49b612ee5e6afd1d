"""The facts that `doctor` judges. Nothing heavy is imported but what must be tried."""

import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastidmm.places import home, prepared

PACKAGES = (
    "torch", "torchvision", "timm", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
    "nvidia-dali", "ffcv", "apex",
)  # fmt: skip
FILE_BYTES, CHUNK = 64_000_000, 1_000_000
# Folder below the root, what the container may use, what it does, what of that is kept at will.
CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_inactive_file"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it."""

    name: str
    memory: int  # bytes
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Disk:
    """What a file of 64 MB met."""

    free: int  # bytes
    write: float  # bytes per second, synced
    read: float  # bytes per second


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the lines depend on."""

    python: tuple[int, int, int]
    system: str  # Linux, Darwin
    packages: dict[str, str]  # installed distributions and their versions
    faults: dict[str, str]  # what was tried and failed, and why
    cuda: str | None  # what torch was built for
    gpus: tuple[Gpu, ...]  # those that torch sees
    archs: tuple[str, ...]  # what torch has kernels for: sm_90, compute_120
    driver: str  # of NVIDIA, as nvidia-smi tells it; empty where it does not
    listed: tuple[str, ...]  # the GPUs that nvidia-smi names
    visible: str | None  # CUDA_VISIBLE_DEVICES
    compiler: bool  # one for C, where Triton looks for it
    apex: Literal["absent", "other", "python", "cuda"]
    memory: tuple[int, int | None]  # bytes in all and, where known, available
    cores: int
    threads: str  # OMP_NUM_THREADS
    home: Path
    disk: Disk | str  # or why it cannot be written
    prepared: tuple[str, ...]


def look() -> Facts:
    """The facts of this machine; imports torch, torchvision and Triton, where they are."""
    packages = {name: version for name in PACKAGES if (version := version_of(name))}
    faults: dict[str, str] = {}
    for name in ("torch", "torchvision", "triton"):
        # torchvision without torch has only torch's fault to tell.
        if name in packages and not (name == "torchvision" and "torch" in faults):
            _note_fault(name, faults)
    cuda, gpus, archs = _as_torch_sees_it(faults) if "torch" in sys.modules else (None, (), ())
    listed, driver = _nvidia_smi(faults)
    if "ffcv" in packages:
        _load_ffcv(faults)
    place = home()
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        packages=packages,
        faults=faults,
        cuda=cuda,
        gpus=gpus,
        archs=archs,
        driver=driver,
        listed=listed,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        compiler=bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")),
        apex=apex_kind(),
        memory=memory(),
        cores=num_cores(),
        threads=os.environ.get("OMP_NUM_THREADS", ""),
        home=place,
        disk=measure(place),
        prepared=tuple(prepared()),
    )


def version_of(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _note_fault(module: str, faults: dict[str, str]) -> None:
    try:
        importlib.import_module(module)
    except Exception as problem:  # a broken library can raise anything
        faults[module] = _first_line(problem)


def _first_line(problem: object) -> str:
    """What is worth saying of an error or output, in one line."""
    told = str(problem).strip() or type(problem).__name__
    return told.splitlines()[0][:200]


def _as_torch_sees_it(
    faults: dict[str, str],
) -> tuple[str | None, tuple[Gpu, ...], tuple[str, ...]]:
    """CUDA's version, the GPUs, and what this torch has kernels for."""
    torch: Any = sys.modules["torch"]
    if torch.version.cuda is None:
        return None, (), ()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            usable = torch.cuda.is_available()
            gpus = [
                torch.cuda.get_device_properties(place)
                for place in range(torch.cuda.device_count() if usable else 0)
            ]
        except RuntimeError as problem:
            faults["cuda"], gpus = _first_line(problem), []
    if told and not gpus:
        faults.setdefault("cuda", _first_line(told[0].message))
    seen = tuple(Gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in gpus)
    return torch.version.cuda, seen, tuple(torch.cuda.get_arch_list())


def _nvidia_smi(faults: dict[str, str]) -> tuple[tuple[str, ...], str]:
    """The GPUs that nvidia-smi lists, and the driver's version; nothing where it cannot."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return (), ""
    except (OSError, subprocess.TimeoutExpired) as problem:
        faults["nvidia-smi"] = _first_line(problem)
        return (), ""
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        faults["nvidia-smi"] = _first_line(
            done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}"
        )
        return (), ""
    return tuple(name for _, name in rows), rows[0][0]


def _load_ffcv(faults: dict[str, str]) -> None:
    """Load FFCV's compiled part alone: ffcv itself takes seconds to import."""
    spec = find_spec("ffcv")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder).glob("_libffcv*.so"):
            try:
                ctypes.CDLL(str(library))
            except OSError as problem:
                faults["ffcv"] = _first_line(problem)


def apex_kind() -> Literal["absent", "other", "python", "cuda"]:
    """Whose apex is installed, told by its files: `python` and `cuda` are NVIDIA's."""
    spec = find_spec("apex")
    if spec is None:
        return "absent"
    folders = spec.submodule_search_locations or ()
    if not any((Path(folder) / "optimizers/fused_lamb.py").is_file() for folder in folders):
        return "other"
    return "cuda" if find_spec("amp_C") else "python"


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory(root: Path = Path("/")) -> tuple[int, int | None]:
    """Bytes in all and, where known, available, both within a container's limit."""
    file = root / "proc/meminfo"
    text = file.read_text() if file.is_file() else ""
    told = {name: int(kib) << 10 for name, kib in re.findall(r"(?m)^(\w+): +(\d+) kB", text)}
    total = told.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = told.get("MemAvailable")
    for group, limit, usage, idle in _groups(root):
        try:
            most = int((group / limit).read_text())
            used = int((group / usage).read_text())
            stat = (group / "memory.stat").read_text()
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
        if most < total:
            kept = re.search(rf"^{idle} (\d+)", stat, re.M)
            left = most - used + (int(kept[1]) if kept else 0)
            total, available = most, left if available is None else min(available, left)
    return total, available


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """This process's memory groups with their files' names, each after the one that holds it.

    In a container its own is the outermost; a scheduler's job lies further in.
    """
    told = root / "proc/self/cgroup"
    lines = told.read_text().splitlines() if told.is_file() else []
    for folder, limit, usage, idle in CGROUPS:
        kind = "memory" if folder.endswith("memory") else ""
        split = [line.split(":", 2) for line in lines]
        paths = [path for _, kinds, path in split if kind in kinds.split(",")]
        inner = [part for part in paths[0].split("/") if part] if paths else []
        for depth in range(len(inner) + 1):
            yield root.joinpath(folder, *inner[:depth]), limit, usage, idle


def measure(folder: Path) -> Disk | str:
    """Write a file where `folder` is or would be, and read it; why not, where that fails."""
    place = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    chunk = os.urandom(CHUNK)
    try:
        with tempfile.TemporaryFile(dir=place) as file:  # has no name: it cannot stay behind
            start = time.perf_counter()
            for _ in range(FILE_BYTES // CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):  # else memory answers for the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(CHUNK):
                pass
            read = time.perf_counter()
    except OSError as problem:
        return problem.strerror or _first_line(problem)
    rates = FILE_BYTES / (written - start), FILE_BYTES / (read - began)
    return Disk(shutil.disk_usage(place).free, *rates)
