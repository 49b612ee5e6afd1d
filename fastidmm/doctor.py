"""What to say of this machine: what it has, and the command for what it lacks.

Every line is a function of `facts.Facts` alone, so that each can be tested on any machine.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

from fastidmm.facts import Facts

NEEDS = {"torch": (2, 8), "timm": (1, 0, 26)}  # as in pyproject.toml
PYTHONS = ((3, 11), (3, 14))  # oldest and newest
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
DRIVERS = {12: 525, 13: 580}  # oldest NVIDIA driver by major version of CUDA
OLDEST_OF_CUDA_13 = (7, 5)  # compute capability
INDEX = "https://download.pytorch.org/whl"
FFCV_NEEDS = "apt-get install -y --no-install-recommends libopencv-dev libturbojpeg0-dev pkg-config"
APEX = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)
LITTLE_MEMORY = 4 << 30  # bytes

State = Literal["ok", "missing", "mend"]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing looked at; `missing` is optional, `mend` is wrong."""

    name: str
    state: State
    found: str
    commands: tuple[str, ...] = ()


def lines(facts: Facts) -> list[Line]:
    """What there is to say, in the order in which one would install."""
    return [
        python_line(facts),
        torch_line(facts),
        torchvision_line(facts),
        timm_line(facts),
        gpu_line(facts),
        triton_line(facts),
        dali_line(facts),
        ffcv_line(facts),
        apex_line(facts),
        memory_line(facts),
        cores_line(facts),
        disk_line(facts),
        datasets_line(facts),
    ]


def table(found: list[Line]) -> str:
    """The lines for people: name, state, what was found, and below it what to type."""
    shown = []
    for line in found:
        shown.append(f"{line.name:<13}{line.state:<9}{line.found}")
        shown += [" " * 22 + command for command in line.commands]
    wrong = [line.name for line in found if line.state == "mend"]
    return "\n".join(
        [*shown, "", f"to mend: {', '.join(wrong)}" if wrong else "all that is needed is well"]
    )


def as_dicts(found: list[Line]) -> list[dict[str, object]]:
    """The same for scripts."""
    return [asdict(line) for line in found]


def python_line(facts: Facts) -> Line:
    """Whether wheels of all that is needed exist for this Python."""
    version = ".".join(map(str, facts.python))
    (_, oldest), (_, newest) = PYTHONS
    if PYTHONS[0] <= facts.python[:2] <= PYTHONS[1]:
        return Line("Python", "ok", version)
    fresh = f"python3.{newest} -m venv .venv && .venv/bin/pip install ."
    return Line("Python", "mend", f"{version}; 3.{oldest} to 3.{newest} are right", (fresh,))


def torch_line(facts: Facts) -> Line:
    """Whether torch is there, new enough, and built for the GPU that is."""
    version = facts.packages.get("torch")
    if version is None:
        return Line("torch", "mend", "not installed", _torch_anew(facts)[1:])
    if fault := facts.faults.get("torch"):
        return Line("torch", "mend", f"{version} cannot be imported: {fault}", _torch_anew(facts))
    if _numbers(version) < NEEDS["torch"]:
        found = f"{version}; {_dotted(NEEDS['torch'])} or newer is needed"
        return Line("torch", "mend", found, _torch_anew(facts))
    if facts.cuda is None and facts.driver:
        found = f"{version}, built for CPUs, beside an NVIDIA GPU"
        return Line("torch", "mend", found, _torch_anew(facts))
    built = f"CUDA {facts.cuda}" if facts.cuda else "CPUs"
    return Line("torch", "ok", f"{version}, built for {built}")


def torchvision_line(facts: Facts) -> Line:
    """Whether torchvision imports beside this torch."""
    version, torch = facts.packages.get("torchvision"), facts.packages.get("torch")
    build = "cu" + facts.cuda.replace(".", "") if facts.cuda else "cpu"
    fitting = f"pip install {_kept_torch(facts)}torchvision --index-url {INDEX}/{build}"
    again: tuple[str, ...] = ("pip uninstall -y torchvision", fitting)
    if _torch_goes(facts):
        again = _torch_anew(facts)  # brings both
    if version is None:
        return Line("torchvision", "mend", "not installed", again[1:])
    fault = facts.faults.get("torchvision")
    if fault is None:
        return Line("torchvision", "ok", version)
    found = f"{version} cannot be imported: {fault}"
    if "torchvision::nms" in fault:
        found = f"{version} is not built for torch {torch} ({fault}); fastidmm works round it"
    return Line("torchvision", "mend", found, again)


def timm_line(facts: Facts) -> Line:
    """Whether timm is there and new enough."""
    version = facts.packages.get("timm")
    needed = _dotted(NEEDS["timm"])
    # Without torch named beside it, timm may bring another build of it.
    command = f"pip install {_kept_torch(facts)}'timm>={needed}'"
    if version is None:
        return Line("timm", "mend", "not installed", (command,))
    if _numbers(version) < NEEDS["timm"]:
        return Line("timm", "mend", f"{version}; {needed} or newer is needed", (command,))
    return Line("timm", "ok", version)


def gpu_line(facts: Facts) -> Line:
    """The GPUs that torch sees, or why it sees none."""
    if facts.gpus:
        return _seen_line(facts)
    if not facts.driver:
        fault = facts.faults.get("nvidia-smi")
        found = "no NVIDIA GPU: everything runs on the CPU, slowly"
        return Line("GPU", "ok", found + (f" (nvidia-smi: {fault})" if fault else ""))
    listed = f"{_counted(facts.listed)}, driver {facts.driver}"
    if facts.cuda is None:
        return Line("GPU", "ok", f"{listed}; not used until torch is mended")
    driver, needed = _numbers(facts.driver)[0], DRIVERS.get(_numbers(facts.cuda)[0], 0)
    if driver < needed:
        found = f"{listed}; torch's CUDA {facts.cuda} needs driver {needed} or newer"
        newer = (f"install driver {needed} or newer: https://www.nvidia.com/drivers",)
        return Line("GPU", "mend", found, newer if driver < DRIVERS[12] else _torch_anew(facts))
    if facts.visible is not None and "cuda" not in facts.faults:
        return Line("GPU", "ok", f"{listed}; hidden by CUDA_VISIBLE_DEVICES={facts.visible!r}")
    found = f"{listed}; torch cannot use it: {facts.faults.get('cuda', 'it sees none')}"
    return Line("GPU", "mend", found, ("sudo modprobe -r nvidia_uvm; sudo modprobe nvidia_uvm",))


def _seen_line(facts: Facts) -> Line:
    told = [
        f"{gpu.name}, {_gib(gpu.memory)}, compute capability {_dotted(gpu.capability)}"
        for gpu in facts.gpus
    ]
    found = _counted(tuple(told)) + (f"; driver {facts.driver}" if facts.driver else "")
    if all(_has_kernels(facts.archs, gpu.capability) for gpu in facts.gpus):
        return Line("GPU", "ok", found)
    found += f"; this torch has kernels for {', '.join(facts.archs)} only"
    return Line("GPU", "mend", found, _torch_anew(facts))


def triton_line(facts: Facts) -> Line:
    """Whether the fused kernels can be compiled."""
    if facts.system != "Linux":
        return _elsewhere("Triton", facts)
    version, gpu = facts.packages.get("triton"), bool(facts.gpus or facts.driver)
    if version is None:
        command = f"pip install {_kept_torch(facts)}'triton>=3'"
        found = "not installed; the fused kernels of GPUs need it"
        return Line("Triton", "mend" if gpu else "missing", found, (command,))
    if fault := facts.faults.get("triton"):
        again = f"pip install --force-reinstall --no-deps triton=={version}"
        return Line("Triton", "mend", f"{version} cannot be imported: {fault}", (again,))
    if gpu and not facts.compiler:
        found = f"{version}; without a C compiler it cannot start a kernel"
        return Line("Triton", "mend", found, ("apt-get install -y gcc python3-dev",))
    return Line("Triton", "ok", version)


def dali_line(facts: Facts) -> Line:
    """Whether NVIDIA DALI is there, and not the placeholder that PyPI has under its bare name."""
    if facts.system != "Linux":
        return _elsewhere("DALI", facts)
    for name in DALI:
        if name in facts.packages:
            return Line("DALI", "ok", f"{facts.packages[name]} ({name})")
    extra = "dali-cuda12" if facts.cuda and _numbers(facts.cuda)[0] == 12 else "dali"
    install = f"pip install 'fastidmm[{extra}]'"
    if "nvidia-dali" in facts.packages:
        found = "nvidia-dali is a placeholder, not DALI"
        return Line("DALI", "mend", found, ("pip uninstall -y nvidia-dali", install))
    return Line("DALI", "missing", "not installed; optional", (install,))


def ffcv_line(facts: Facts) -> Line:
    """Whether FFCV is there, and the libraries that it is linked to."""
    if facts.system != "Linux":
        return _elsewhere("FFCV", facts)
    version = facts.packages.get("ffcv")
    if version is None:
        commands = (FFCV_NEEDS, "pip install 'fastidmm[ffcv]'")
        return Line("FFCV", "missing", "not installed; optional, built where it is", commands)
    if fault := facts.faults.get("ffcv"):
        # pip keeps what it built, which is linked to the libraries of that day.
        built = f"pip install --force-reinstall --no-deps --no-cache-dir ffcv=={version}"
        return Line("FFCV", "mend", f"{version} cannot be loaded: {fault}", (FFCV_NEEDS, built))
    return Line("FFCV", "ok", version)


def apex_line(facts: Facts) -> Line:
    """Whether apex is NVIDIA's, which PyPI does not have, and built with its CUDA extension."""
    version = facts.packages.get("apex", "without a version")
    if facts.apex == "absent":
        found = "not installed; optional"
        gpu = facts.gpus or facts.driver
        return Line("apex", "missing", found, (APEX,)) if gpu else Line("apex", "ok", found)
    if facts.apex == "other":
        found = f"{version}; this is a Pyramid toolkit, not NVIDIA's"
        return Line("apex", "mend", found, ("pip uninstall -y apex",))
    if facts.apex == "python":
        found = f"{version}, NVIDIA's without amp_C, which FusedLAMB needs; optional"
        return Line("apex", "missing", found, (APEX,))
    return Line("apex", "ok", f"{version}, NVIDIA's with FusedLAMB")


def memory_line(facts: Facts) -> Line:
    """How much memory there is; too little is told, but nothing is wrong."""
    total, available = facts.memory
    found = _gib(total) + ("" if available is None else f", {_gib(available)} available")
    if (total if available is None else available) < LITTLE_MEMORY:
        found += "; that is little: close other programs, or lower --batch-size"
    return Line("memory", "ok", found)


def cores_line(facts: Facts) -> Line:
    """How many cores this process may use, and threads that were asked for."""
    found = f"{facts.cores}, OMP_NUM_THREADS {facts.threads or 'not set'}"
    if facts.threads.isdecimal() and int(facts.threads) > facts.cores:
        found += ": more threads than cores are slower"
        return Line("cores", "mend", found, ("unset OMP_NUM_THREADS",))
    return Line("cores", "ok", found)


def disk_line(facts: Facts) -> Line:
    """Space and speed where prepared datasets lie."""
    if isinstance(facts.disk, str):
        command = "export FASTIDMM_HOME=FOLDER  # one with space, that you may write to"
        return Line("disk", "mend", f"{facts.home} cannot be written: {facts.disk}", (command,))
    free, write, read = facts.disk.free / 1e9, facts.disk.write / 1e6, facts.disk.read / 1e6
    found = f"{facts.home}: {free:,.1f} GB free, writes {write:,.0f} MB/s, reads {read:,.0f} MB/s"
    return Line("disk", "ok", found)


def datasets_line(facts: Facts) -> Line:
    """What is prepared."""
    if not facts.prepared:
        command = "fastidmm prepare --dataset folder --from PHOTOS --name mine"
        return Line("datasets", "missing", "none prepared yet", (command,))
    return Line("datasets", "ok", f"{len(facts.prepared)} prepared: {', '.join(facts.prepared)}")


def _torch_anew(facts: Facts) -> tuple[str, str]:
    """Commands for the torch and torchvision that fit the GPU and its driver."""
    old_gpu = any(gpu.capability < OLDEST_OF_CUDA_13 for gpu in facts.gpus)
    old_driver = bool(facts.driver) and _numbers(facts.driver)[0] < DRIVERS[13]
    nvidia = facts.gpus or facts.driver
    build = "cpu" if not nvidia else "cu126" if old_gpu or old_driver else "cu130"
    install = f"pip install torch torchvision --index-url {INDEX}/{build}"
    return "pip uninstall -y torch torchvision", install


def _torch_goes(facts: Facts) -> bool:
    """Whether another line has torch replaced, or newly installed."""
    install = _torch_anew(facts)[1]
    return any(install in line.commands for line in (torch_line(facts), gpu_line(facts)))


def _kept_torch(facts: Facts) -> str:
    """This torch as pip is told to keep it; nothing where it goes anyway."""
    return "" if _torch_goes(facts) else f"torch=={facts.packages['torch'].partition('+')[0]} "


def _has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Binaries run on their own major version from their minor on, PTX on whatever is newer."""
    for arch in archs:
        told = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if told is None:
            continue
        built = int(told[2]), int(told[3])
        later = built < capability and (told[1] == "compute" or built[0] == capability[0])
        if built == capability or (later and not told[4]):  # sm_90a: for 9.0 alone
            return True
    return False


def _elsewhere(name: str, facts: Facts) -> Line:
    return Line(name, "ok", f"not for {facts.system}; optional")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; 0 where there are none."""
    told = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in told[0].split(".")) if told else (0,)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _counted(names: tuple[str, ...]) -> str:
    """Each name once, with how often it is there."""
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(names).items())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
