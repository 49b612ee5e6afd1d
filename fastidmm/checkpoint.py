"""Checkpoints: safetensors beside a JSON with SHA-256 sums, written aside and renamed.

A folder `step_000000800/` is whole or not there: files are synced before it gets its name.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm.errors import DataError

KEPT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: Any) -> Path:
    """Write `folder/step_…` and drop all but the newest two; `tensors` by file name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = at(folder, step)
    aside = folder / f".{final.name}.{os.getpid()}"
    for left in folder.glob(".step_*"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, table in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in table.items()}, aside / name)
        sums = {name: _sha256(aside / name) for name in tensors}
        (aside / STATE).write_text(json.dumps({"step": step, "state": state, "sha256": sums}))
        for path in aside.iterdir():
            sync(path)
        _drop(final)
        aside.rename(final)
        sync(folder)
    except SafetensorError as problem:
        raise DataError(
            f"cannot write {aside}: {problem}; free some space, then `fastidmm resume` the run."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in found(folder)[:-KEPT]:
        _drop(old)
    return final


def found(folder: Path) -> list[Path]:
    """All checkpoints of a run, the newest last."""
    return sorted(path for path in folder.glob("step_*") if (path / STATE).exists())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(found(folder)), None)


def at(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after so many steps."""
    return folder / f"step_{step:09d}"


def step_of(path: Path) -> int:
    """How many steps had been made."""
    return int(path.name.removeprefix("step_"))


def load(path: Path, *names: str) -> tuple[list[dict[str, Tensor]], Any]:
    """The files `names` of a checkpoint and its state, their sums checked; tensors on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        described = json.loads((path / STATE).read_text())
        for name in names:
            if _sha256(path / name) != described["sha256"][name]:
                raise ValueError(f"{name} is damaged")
        # Copies: a memory map would tie the run to a file that is soon replaced.
        files = [{k: t.clone() for k, t in load_file(path / n).items()} for n in names]
        return files, described["state"]
    except (OSError, KeyError, ValueError, SafetensorError) as problem:
        raise DataError(
            f"the checkpoint {path} cannot be read ({problem}); delete that folder to go on from "
            "the one before it."
        ) from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat names: parameter's number, then key."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": t for number, table in state.items() for key, t in table.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; parameter groups stay as they are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        param = params[int(number)]
        if tensor.shape == param.shape:
            # The fused optimizer walks memory: a moment must lie as its parameter does, and a
            # channels-last weight came back from the file as a contiguous one.
            tensor = torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop(path: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves nothing that looks like one."""
    if path.exists():
        aside = path.rename(path.with_name(f".{path.name}.old.{os.getpid()}"))
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """See a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
