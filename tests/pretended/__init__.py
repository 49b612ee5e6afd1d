"""A GPU's stand-in for whole programs: tensors that say they are on one, and compute on the CPU.

    PYTHONPATH=tests python -m pytest -p pretended -m gpu tests/gpu/FILE -k NAME

Loaded before torch. What runs then takes the branches that a GPU takes, and what a GPU would refuse
is refused: operands on two devices, a kernel given memory it cannot reach, waiting for the device
where that was forbidden, anything that a capture cannot hold. Kernels are interpreted, graphs are
`recorded.Recorded`. What it cannot show: speed, rounding, races, a kernel's resources.
"""

# ruff: noqa: E402

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

os.environ["TRITON_INTERPRET"] = "1"


def _load() -> None:
    """Compile `device.cpp` and load it: torch asks once, when it is imported.

    PRETENDED names the file that holds it compiled, which is made where there is none.
    """
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_ = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(os.environ.get("PRETENDED") or Path(folder) / "pretended.so")
        if not library.exists():
            subprocess.run(
                ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{torch_}/include",
                 str(Path(__file__).with_name("device.cpp")), "-o", str(library)], check=True,
            )  # fmt: skip
        for name in ("c10", "torch_cpu"):
            ctypes.CDLL(str(torch_ / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


_load()

from pretended.cuda import install

install()


def leave(status: int = 0) -> NoReturn:
    """End the process at once: autograd's thread for the device may not outlive Python's own end.

    At an ordinary end it asks for the interpreter now and then, and the process is aborted.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def larger() -> None:
    """Have programs hold more: an interpreter's time is by the program, whatever each holds."""
    from fastidmm.kernels import add_norm, linear_dwconv_gelu, linear_gelu, views

    views.PARTS = 8
    add_norm.ELEMENTS = linear_gelu.ELEMENTS = 1 << 15
    linear_dwconv_gelu.ELEMENTS = 64


# Sizes of the GPU's tests that an interpreter gets through.
SMALLER: dict[str, dict[str, int | str]] = {
    "test_capture_on_device": {
        "NUM": 5, "BATCH": 3, "STEPS": 12, "BACKBONE": "vit_micro", "AHEAD_PX": 32
    },
    "test_on_device": {"BATCH": 7},
}  # fmt: skip


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As pytest calls it."""
    larger()
    for item in items:
        for name, value in SMALLER.get(item.module.__name__.split(".")[-1], {}).items():
            setattr(item.module, name, value)


STATUS = [0]


def pytest_sessionfinish(exitstatus: int) -> None:
    """As pytest calls it, before all is said."""
    STATUS[0] = int(exitstatus)


def pytest_unconfigure() -> None:
    """As pytest calls it, after all is said."""
    leave(STATUS[0])
