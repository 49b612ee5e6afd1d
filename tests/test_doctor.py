"""What `doctor` says of machines that this one is not; how it looks is in test_facts.py."""

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastidmm import cli, doctor, facts
from fastidmm.facts import Disk, Facts, Gpu

CPU, CU126, CU130 = (
    f"pip install torch torchvision --index-url https://download.pytorch.org/whl/{build}"
    for build in ("cpu", "cu126", "cu130")
)
AWAY = "pip uninstall -y torch torchvision"
APT = "apt-get install -y --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config"
H200 = Gpu("NVIDIA H200", 150_121_152_512, (9, 0))
PACKAGES = {
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "timm": "1.0.31",
    "triton": "3.7.1",
    "nvidia-dali-cuda130": "2.4.0",
    "ffcv": "1.0.2",
    "apex": "0.1",
}
GOOD = Facts(
    python=(3, 12, 3),
    system="Linux",
    packages=PACKAGES,
    faults={},
    cuda="13.0",
    gpus=(H200,),
    archs=("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"),
    driver="580.65.06",
    listed=("NVIDIA H200",),
    visible=None,
    compiler=True,
    apex="cuda",
    memory=(137_438_953_472, 64_424_509_440),
    cores=16,
    threads="",
    home=Path("/data/fastidmm"),
    disk=Disk(free=1_234_560_000_000, write=1_234_500_000.0, read=98_700_000.0),
    prepared=("cub", "flowers"),
)


def without(*names: str, **other: str) -> dict[str, str]:
    """The packages but these, with others in addition or in another version."""
    return {name: kept for name, kept in PACKAGES.items() if name not in names} | {
        name.replace("_", "-"): version for name, version in other.items()
    }


# Where torch is built for CPUs and there is no GPU.
BARE: dict[str, Any] = {
    "packages": without(torch="2.13.0+cpu"),
    "cuda": None,
    "gpus": (),
    "archs": (),
    "driver": "",
    "listed": (),
}
# Where torch sees no GPU, but nvidia-smi does.
UNSEEN: dict[str, Any] = {"gpus": (), "listed": ("NVIDIA L4", "NVIDIA L4", "NVIDIA T4")}
LISTED = "2 x NVIDIA L4, NVIDIA T4, driver"
NMS = "operator torchvision::nms does not exist"


def test_a_machine_that_lacks_nothing() -> None:
    assert doctor.table(doctor.lines(GOOD)).splitlines() == [
        "Python       ok       3.12.3",
        "torch        ok       2.13.0, built for CUDA 13.0",
        "torchvision  ok       0.28.0",
        "timm         ok       1.0.31",
        "GPU          ok       NVIDIA H200, 139.8 GiB, compute capability 9.0; driver 580.65.06",
        "Triton       ok       3.7.1",
        "DALI         ok       2.4.0 (nvidia-dali-cuda130)",
        "FFCV         ok       1.0.2",
        "apex         ok       0.1, NVIDIA's with FusedLAMB",
        "memory       ok       128.0 GiB, 60.0 GiB available",
        "cores        ok       16, OMP_NUM_THREADS not set",
        "disk         ok       /data/fastidmm: 1,234.6 GB free, writes 1,234 MB/s, reads 99 MB/s",
        "datasets     ok       2 prepared: cub, flowers",
        "",
        "all that is needed is well",
    ]


CASES: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    ("Python", {"python": (3, 11, 0)}, "ok", "3.11.0", ()),
    ("Python", {"python": (3, 14, 9)}, "ok", "3.14.9", ()),
    (
        "Python", {"python": (3, 10, 14)}, "mend", "3.10.14; 3.11 to 3.14 are right",
        ("python3.14 -m venv .venv && .venv/bin/pip install .",),
    ),
    (
        "Python", {"python": (3, 15, 0)}, "mend", "3.15.0; 3.11 to 3.14 are right",
        ("python3.14 -m venv .venv && .venv/bin/pip install .",),
    ),
    ("torch", BARE, "ok", "2.13.0+cpu, built for CPUs", ()),
    ("torch", {"packages": without("torch")}, "mend", "not installed", (CU130,)),
    ("torch", BARE | {"packages": without("torch")}, "mend", "not installed", (CPU,)),
    (
        "torch", {"packages": without(torch="2.7.1")}, "mend",
        "2.7.1; 2.8 or newer is needed", (AWAY, CU130),
    ),
    ("torch", {"packages": without(torch="2.10.0")}, "ok", "2.10.0, built for CUDA 13.0", ()),
    (
        "torch", {"faults": {"torch": "libcudart.so.13: cannot open"}, "cuda": None}, "mend",
        "2.13.0 cannot be imported: libcudart.so.13: cannot open", (AWAY, CU130),
    ),
    (
        "torch", {"packages": without(torch="2.13.0+cpu"), "cuda": None, "gpus": ()}, "mend",
        "2.13.0+cpu, built for CPUs, beside an NVIDIA GPU", (AWAY, CU130),
    ),
    (
        "torch", {"cuda": None, "gpus": (), "driver": "550.54.15"}, "mend",
        "2.13.0, built for CPUs, beside an NVIDIA GPU", (AWAY, CU126),
    ),
    (
        "torchvision", BARE | {"faults": {"torchvision": NMS}}, "mend",
        f"0.28.0 is not built for torch 2.13.0+cpu ({NMS}); fastidmm works round it",
        (
            "pip uninstall -y torchvision",
            "pip install torch==2.13.0 torchvision "
            "--index-url https://download.pytorch.org/whl/cpu",
        ),
    ),
    (
        "torchvision", {"faults": {"torchvision": NMS}, "cuda": "12.6"}, "mend",
        f"0.28.0 is not built for torch 2.13.0 ({NMS}); fastidmm works round it",
        (
            "pip uninstall -y torchvision",
            "pip install torch==2.13.0 torchvision "
            "--index-url https://download.pytorch.org/whl/cu126",
        ),
    ),
    (
        "torchvision", BARE | {"faults": {"torchvision": NMS}, "driver": "580.1"}, "mend",
        f"0.28.0 is not built for torch 2.13.0+cpu ({NMS}); fastidmm works round it",
        (AWAY, CU130),
    ),
    (
        "torchvision", {"faults": {"torchvision": "no libjpeg"}}, "mend",
        "0.28.0 cannot be imported: no libjpeg",
        (
            "pip uninstall -y torchvision",
            "pip install torch==2.13.0 torchvision "
            "--index-url https://download.pytorch.org/whl/cu130",
        ),
    ),
    (
        "torchvision", BARE | {"packages": without("torchvision")}, "mend", "not installed",
        (
            "pip install torch==2.13.0 torchvision "
            "--index-url https://download.pytorch.org/whl/cpu",
        ),
    ),
    (
        "torchvision", BARE | {"packages": without("torch", "torchvision")}, "mend",
        "not installed", (CPU,),
    ),
    (
        "timm", BARE | {"packages": without("timm", torch="2.13.0+cpu")}, "mend",
        "not installed", ("pip install torch==2.13.0 'timm>=1.0.26'",),
    ),
    (
        "timm", {"packages": without(timm="1.0.9")}, "mend",
        "1.0.9; 1.0.26 or newer is needed", ("pip install torch==2.13.0 'timm>=1.0.26'",),
    ),
    (
        "timm", {"packages": without("torch", "timm")}, "mend", "not installed",
        ("pip install 'timm>=1.0.26'",),
    ),
    ("GPU", BARE, "ok", "no NVIDIA GPU: everything runs on the CPU, slowly", ()),
    (
        "GPU", BARE | {"faults": {"nvidia-smi": "No devices were found"}}, "ok",
        "no NVIDIA GPU: everything runs on the CPU, slowly (nvidia-smi: No devices were found)",
        (),
    ),
    (
        "GPU", {"gpus": (H200,) * 8, "driver": ""}, "ok",
        "8 x NVIDIA H200, 139.8 GiB, compute capability 9.0", (),
    ),
    (
        "GPU", UNSEEN | {"cuda": None}, "ok",
        f"{LISTED} 580.65.06; not used until torch is mended", (),
    ),
    (
        "GPU", UNSEEN | {"visible": ""}, "ok",
        f"{LISTED} 580.65.06; hidden by CUDA_VISIBLE_DEVICES=''", (),
    ),
    (
        "GPU", UNSEEN | {"driver": "579.9"}, "mend",
        f"{LISTED} 579.9; torch's CUDA 13.0 needs driver 580 or newer", (AWAY, CU126),
    ),
    (
        "GPU", UNSEEN | {"driver": "470.256.02", "cuda": "12.6"}, "mend",
        f"{LISTED} 470.256.02; torch's CUDA 12.6 needs driver 525 or newer",
        ("install driver 525 or newer: https://www.nvidia.com/drivers",),
    ),
    (
        "GPU", UNSEEN | {"faults": {"cuda": "CUDA unknown error"}, "visible": "0"}, "mend",
        f"{LISTED} 580.65.06; torch cannot use it: CUDA unknown error",
        ("sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm",),
    ),
    (
        "GPU", UNSEEN, "mend", f"{LISTED} 580.65.06; torch cannot use it: it sees none",
        ("sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm",),
    ),
    (
        "GPU", {"gpus": (replace(H200, capability=(7, 0)),), "archs": ("sm_75", "sm_90a")}, "mend",
        "NVIDIA H200, 139.8 GiB, compute capability 7.0; driver 580.65.06; "
        "this torch has kernels for sm_75, sm_90a only", (AWAY, CU126),
    ),
    (
        "timm", {"gpus": (replace(H200, capability=(7, 0)),), "packages": without("timm")}, "mend",
        "not installed", ("pip install 'timm>=1.0.26'",),
    ),
    ("Triton", {"system": "Darwin"}, "ok", "not for Darwin; optional", ()),
    (
        "Triton", {"packages": without("triton")}, "mend",
        "not installed; the fused kernels of GPUs need it",
        ("pip install torch==2.13.0 'triton>=3'",),
    ),
    (
        "Triton", BARE | {"packages": without("triton")}, "missing",
        "not installed; the fused kernels of GPUs need it",
        ("pip install torch==2.13.0 'triton>=3'",),
    ),
    (
        "Triton", {"faults": {"triton": "bad ELF"}}, "mend", "3.7.1 cannot be imported: bad ELF",
        ("pip install --force-reinstall --no-deps triton==3.7.1",),
    ),
    (
        "Triton", {"compiler": False}, "mend",
        "3.7.1; without a C compiler it cannot start a kernel",
        ("apt-get install -y gcc python3-dev",),
    ),
    ("Triton", BARE | {"compiler": False}, "ok", "3.7.1", ()),
    ("DALI", {"system": "Darwin"}, "ok", "not for Darwin; optional", ()),
    (
        "DALI", {"packages": {"nvidia-dali-cuda120": "1.50", "nvidia-dali": "0"}}, "ok",
        "1.50 (nvidia-dali-cuda120)", (),
    ),
    (
        "DALI", {"packages": without("nvidia-dali-cuda130")}, "missing",
        "not installed; optional", ("pip install 'fastidmm[dali]'",),
    ),
    (
        "DALI", {"packages": without("nvidia-dali-cuda130"), "cuda": "12.8"}, "missing",
        "not installed; optional", ("pip install 'fastidmm[dali-cuda12]'",),
    ),
    (
        "DALI", BARE | {"packages": without("nvidia-dali-cuda130", nvidia_dali="0.1")}, "mend",
        "nvidia-dali is a placeholder, not DALI",
        ("pip uninstall -y nvidia-dali", "pip install 'fastidmm[dali]'"),
    ),
    ("FFCV", {"system": "Darwin"}, "ok", "not for Darwin; optional", ()),
    (
        "FFCV", {"packages": without("ffcv")}, "missing",
        "not installed; optional, built where it is",
        (APT, "pip install 'fastidmm[ffcv]'"),
    ),
    (
        "FFCV", {"faults": {"ffcv": "libturbojpeg.so.0: cannot open"}}, "mend",
        "1.0.2 cannot be loaded: libturbojpeg.so.0: cannot open",
        (APT, "pip install --force-reinstall --no-deps --no-cache-dir ffcv==1.0.2"),
    ),
    (
        "apex", {"apex": "absent", "packages": without("apex")}, "missing",
        "not installed; optional",
        (
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
            "git+https://github.com/NVIDIA/apex",
        ),
    ),
    (
        "apex", BARE | {"apex": "absent", "packages": without("apex")}, "ok",
        "not installed; optional", (),
    ),
    (
        "apex", {"apex": "other", "packages": without(apex="0.9.10.dev0")}, "mend",
        "0.9.10.dev0; this is a Pyramid toolkit, not NVIDIA's", ("pip uninstall -y apex",),
    ),
    (
        "apex", {"apex": "python"}, "missing",
        "0.1, NVIDIA's without amp_C, which FusedLAMB needs; optional",
        (
            "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
            "git+https://github.com/NVIDIA/apex",
        ),
    ),
    ("memory", {"memory": (1 << 32, 1 << 32)}, "ok", "4.0 GiB, 4.0 GiB available", ()),
    (
        "memory", {"memory": (1 << 40, (1 << 32) - 1)}, "ok",
        "1024.0 GiB, 4.0 GiB available; that is little: close other programs, or lower "
        "--batch-size", (),
    ),
    (
        "memory", {"memory": (3 << 30, None)}, "ok",
        "3.0 GiB; that is little: close other programs, or lower --batch-size", (),
    ),
    ("cores", {"threads": "16"}, "ok", "16, OMP_NUM_THREADS 16", ()),
    ("cores", {"threads": "4,2"}, "ok", "16, OMP_NUM_THREADS 4,2", ()),
    (
        "cores", {"threads": "17"}, "mend",
        "16, OMP_NUM_THREADS 17: more threads than cores are slower", ("unset OMP_NUM_THREADS",),
    ),
    (
        "disk", {"disk": "Read-only file system"}, "mend",
        "/data/fastidmm cannot be written: Read-only file system",
        ("export FASTIDMM_HOME=FOLDER  # one with space, that you may write to",),
    ),
    (
        "datasets", {"prepared": ()}, "missing", "none prepared yet",
        ("fastidmm prepare --dataset folder --from PHOTOS --name mine",),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "state", "found", "commands"), CASES)
def test_every_line(
    name: str, changes: dict[str, Any], state: str, found: str, commands: tuple[str, ...]
) -> None:
    (line,) = (line for line in doctor.lines(replace(GOOD, **changes)) if line.name == name)
    assert (line.state, line.found, line.commands) == (state, found, commands)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("compute_80", (12, 0), True),
        ("compute_90", (8, 9), False),
        ("sm_75 sm_120", (12, 1), True),
        ("sm_75 sm_100", (12, 0), False),
    ],
)
def test_which_gpu_a_torch_has_kernels_for(
    archs: str, capability: tuple[int, int], runs: bool
) -> None:
    gpu = replace(H200, capability=capability)
    line = doctor.gpu_line(replace(GOOD, gpus=(gpu,), archs=tuple(archs.split())))
    assert line.state == ("ok" if runs else "mend")


def test_what_is_named_is_in_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for name, numbers in doctor.NEEDS.items():
        assert f"{name}>={'.'.join(map(str, numbers))}" in project["dependencies"]
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHONS[0]))
    extras = project["optional-dependencies"]
    assert [*extras["dali"], *extras["dali-cuda12"]] == list(doctor.DALI)
    assert "ffcv" in extras


@pytest.mark.parametrize(("threads", "status"), [("16", 0), ("17", 2)])
def test_the_status_says_whether_something_is_to_be_mended(
    threads: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Optional things that are missing are nothing to mend; the table comes either way."""
    machine = replace(GOOD, packages=without("ffcv"), threads=threads)
    monkeypatch.setattr(facts, "look", lambda: machine)
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["fastidmm", "doctor", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == status
    text, found = capsys.readouterr().out.split("\n\n", 1)
    assert text == doctor.table(doctor.lines(machine)).split("\n\n")[0]
    summary, found = found.split("\n", 1)
    assert summary == ("to mend: cores" if status else "all that is needed is well")
    assert json.loads(found)[7] == {
        "name": "FFCV",
        "state": "missing",
        "found": "not installed; optional, built where it is",
        "commands": [APT, "pip install 'fastidmm[ffcv]'"],
    }
