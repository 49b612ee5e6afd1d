"""What is found of a machine, on made-up machines and on this one."""

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastidmm import facts
from fastidmm.facts import Disk, Gpu

MEMINFO = "MemTotal:       24682416 kB\nMemFree: 9 kB\nMemAvailable:   24140504 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    """Files by path below `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(limit: object, used: int, idle: int) -> dict[str, str]:
    """A container's memory as version 2 of control groups tells it."""
    stat = f"anon 3\ninactive_file {idle}\nactive_file 5\n"
    return {
        "sys/fs/cgroup/memory.max": f"{limit}\n",
        "sys/fs/cgroup/memory.current": f"{used}\n",
        "sys/fs/cgroup/memory.stat": stat,
    }


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    machine = (24_682_416 * 1024, 24_140_504 * 1024)
    one = write(tmp_path / "one", {"proc/meminfo": MEMINFO})
    assert facts.memory(one) == machine
    write(one, group("max", 700, 200))
    assert facts.memory(one) == machine
    write(one, group(1000, 700, 200))
    assert facts.memory(one) == (1000, 500)
    write(one, group(machine[0] - 1, 900, 200))
    assert facts.memory(one) == (machine[0] - 1, min(machine[1], machine[0] - 701))
    old = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n",
    }
    assert facts.memory(write(tmp_path / "old", {"proc/meminfo": MEMINFO} | old)) == (2000, 530)
    inner = {name.replace("memory/memory", "memory/a/job/memory"): v for name, v in old.items()}
    inner["sys/fs/cgroup/memory/a/job/memory.limit_in_bytes"] = "1700"
    job = {"proc/self/cgroup": "7:cpu:/b\n5:hugetlb,memory:/a/job\n0::/\n"}
    both = {"proc/meminfo": MEMINFO} | old | inner | job
    assert facts.memory(write(tmp_path / "job", both)) == (1700, 230)
    old["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712"
    assert facts.memory(write(tmp_path / "old", old)) == machine


def test_memory_where_there_is_no_proc(tmp_path: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts.memory(tmp_path) == (total, None)
    total, available = facts.memory()
    assert available is not None and 0 < available <= total


def test_the_disk_is_measured_where_the_folder_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    clock = iter([10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("sync", os.fstat(file).st_size)))
    # Or memory would answer for the disk; only what has been synced is let go of.
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *told: calls.append(told), raising=False)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = facts.measure(tmp_path / "not" / "yet")
    assert isinstance(found, Disk)
    assert (found.write, found.read) == (32e6, 16e6)
    assert calls == [("sync", 64_000_000), (0, 0, 4)]
    assert abs(found.free - shutil.disk_usage(tmp_path).free) < 1e9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_nothing_stays_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    def fail(file: int) -> None:
        assert os.fstat(file).st_size == 64_000_000
        raise problem

    monkeypatch.setattr(os, "fsync", fail)
    if isinstance(problem, OSError):
        assert facts.measure(tmp_path) == "No space"
    else:
        with pytest.raises(KeyboardInterrupt):
            facts.measure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    assert facts.measure(tmp_path / "home") == os.strerror(errno.ENOTDIR)
    assert facts.measure(tmp_path / "home" / "x") == os.strerror(errno.ENOTDIR)


@pytest.mark.parametrize(
    ("script", "found", "fault"),
    [
        ("echo '580.65.06, NVIDIA H200'; echo '580.65.06, NVIDIA H200, odd'",
         (("NVIDIA H200", "NVIDIA H200, odd"), "580.65.06"), None),
        ("echo 'Sorry, no devices'; exit 6", ((), ""), "Sorry, no devices"),
        ("echo 'Failed to initialize NVML' >&2; echo more >&2; exit 18", ((), ""),
         "Failed to initialize NVML"),
        ("exit 3", ((), ""), "status 3"),
        ("", ((), ""), None),
    ],
)  # fmt: skip
def test_nvidia_smi(
    script: str,
    found: object,
    fault: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if script:
        write(tmp_path, {"nvidia-smi": f"#!/bin/sh\n{script}\n"})
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    faults: dict[str, str] = {}
    assert facts._nvidia_smi(faults) == found
    assert faults == ({} if fault is None else {"nvidia-smi": fault})


def test_nvidia_smi_that_does_not_start_or_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command[0], 30)

    faults: dict[str, str] = {}
    monkeypatch.setattr(subprocess, "run", hang)
    assert facts._nvidia_smi(faults) == ((), "")
    assert faults == {"nvidia-smi": "Command 'nvidia-smi' timed out after 30 seconds"}


def test_whose_apex_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "other": {"apex/lib/libapex.py": "", "apex/optimizers/README": ""},
        "python": {"apex/optimizers/fused_lamb.py": ""},
        "cuda": {"apex/optimizers/fused_lamb.py": "", "amp_C.py": ""},
    }
    for kind, files in kinds.items():
        folder = write(tmp_path / kind, {"apex/__init__.py": ""} | files)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(folder)])  # alone: an apex may be installed
            assert facts.apex_kind() == kind
    for kind, name in (("other", "apex.py"), ("absent", "abex.py")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(write(tmp_path / name, {name: ""}))])
            assert facts.apex_kind() == kind


def test_libraries_that_ffcv_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ffcv", raising=False)
    monkeypatch.syspath_prepend(write(tmp_path, {"ffcv/__init__.py": "raise AssertionError"}))
    faults: dict[str, str] = {}
    facts._load_ffcv(faults)
    assert faults == {}
    write(tmp_path, {"ffcv/_libffcv.cpython-311.so": "no library"})
    facts._load_ffcv(faults)
    assert "_libffcv.cpython-311.so: " in faults["ffcv"]


def fake_torch(**cuda: Any) -> SimpleNamespace:
    """A torch for CUDA 13 with kernels for Ampere."""
    told = {"get_arch_list": lambda: ["sm_80"], "device_count": lambda: 0} | cuda
    return SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(**told))


def test_the_gpus_as_torch_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(place: int) -> SimpleNamespace:
        return SimpleNamespace(name=f"GPU {place}", total_memory=7 + place, major=9, minor=place)

    def usable() -> bool:
        warnings.warn("one that says nothing", stacklevel=1)
        return True

    seen = fake_torch(is_available=usable, device_count=lambda: 2, get_device_properties=properties)
    monkeypatch.setitem(sys.modules, "torch", seen)
    faults: dict[str, str] = {}
    gpus = (Gpu("GPU 0", 7, (9, 0)), Gpu("GPU 1", 8, (9, 1)))
    assert facts._as_torch_sees_it(faults) == ("13.0", gpus, ("sm_80",)) and faults == {}


def test_why_torch_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned() -> bool:
        warnings.warn("CUDA initialization: too old\n(Triggered)", stacklevel=1)
        return False

    def broken() -> bool:
        raise RuntimeError("CUDA error: no luck\nmore")

    for problem, fault in (
        (warned, {"cuda": "CUDA initialization: too old"}),
        (broken, {"cuda": "CUDA error: no luck"}),
        (lambda: False, {}),
    ):
        monkeypatch.setitem(sys.modules, "torch", fake_torch(is_available=problem))
        faults: dict[str, str] = {}
        assert facts._as_torch_sees_it(faults) == ("13.0", (), ("sm_80",)) and faults == fault


def test_all_of_it_by_a_fresh_process(tmp_path: Path) -> None:
    """PyPI's apex, an NVIDIA driver, a Triton that does not import, and too many threads."""
    shims = write(tmp_path / "shims", {
        "apex/__init__.py": "",
        "apex-0.9.10.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n",
        "triton/__init__.py": "raise ImportError('no luck')",
        "triton-7.dist-info/METADATA": "Metadata-Version: 2.1\nName: triton\nVersion: 7\n",
        "bin/nvidia-smi": "#!/bin/sh\necho '580.1, Shown'\n",
    })  # fmt: skip
    (shims / "bin/nvidia-smi").chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": f"{shims}:{Path(__file__).parents[1]}",
        "PATH": f"{shims / 'bin'}:{os.environ['PATH']}",
        "FASTIDMM_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "4097",
    }
    command = [sys.executable, "-m", "fastidmm", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    found = {line["name"]: line for line in json.loads(done.stdout)}
    assert found["torch"]["found"].startswith(torch.__version__.partition("+")[0])
    assert found["apex"]["found"].startswith("0.9.10; this is a Pyramid toolkit")
    assert found["apex"]["commands"] == ["pip uninstall -y apex"]
    assert found["Triton"]["found"] == "7 cannot be imported: no luck"
    assert found["Python"]["found"] == sys.version.split()[0]
    assert found["cores"]["state"] == "mend" and "4097" in found["cores"]["found"]
    assert found["datasets"]["state"] == "missing" and not (tmp_path / "home").exists()
    assert "driver 580.1" in found["GPU"]["found"]


def test_looking_is_free_of_torch_until_it_looks() -> None:
    code = "import sys, fastidmm.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_broken_package_keeps_nobody_from_being_told() -> None:
    heavy = "{'numpy', 'PIL', 'torch'}"
    code = f"import fastidmm.doctor, fastidmm.facts, sys; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
