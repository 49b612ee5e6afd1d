"""Checkpoints: safetensors beside a JSON with SHA-256 sums, written aside and renamed.

A folder `step_000000800/` is whole or not there: files are synced before it gets its name. Two are
kept, and one that has been damaged since is passed over for the one before it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm.apex import counters
from fastidmm.batch import Method
from fastidmm.errors import DataError, unwritable
from fastidmm.optim import Scaler
from fastidmm.places import summed, unsummed
from fastidmm.preparing.files import sync as sync
from fastidmm.progress import say
from fastidmm.ranks import collected, world

KEPT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: Any,
    beside: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/step_…` and drop all but the newest two; `tensors` by file name.

    `beside` tells the sums of the run's other files.
    """
    final = at(folder, step)
    try:
        _write(final, tensors, {"step": step, "state": state, "beside": beside or {}})
        told = found(folder)
        kept = told.index(final)
        # What lies past this step is damaged: a run goes on from the newest that is whole.
        for old in (*told[: max(kept + 1 - KEPT, 0)], *told[kept + 1 :]):
            _drop(old)
    except OSError as problem:
        num_bytes = sum(t.nbytes for table in tensors.values() for t in table.values())
        raise unwritable(problem, final, num_bytes=num_bytes) or problem from None
    return final


def _write(final: Path, tensors: dict[str, dict[str, Tensor]], told: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = final.parent
    aside = folder / f".{final.name}.{os.getpid()}"
    for left in folder.glob(".step_*"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, table in tensors.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in table.items()}, aside / name)
        sums = {name: _sha256(aside / name) for name in tensors}
        (aside / STATE).write_text(json.dumps(summed({**told, "sha256": sums})))
        for path in aside.iterdir():
            sync(path)
        _drop(final)
        aside.rename(final)
        sync(folder)
    except SafetensorError as problem:
        # It tells the system's errors in words only.
        if not (number := re.search(r"\(os error (\d+)\)", str(problem))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(aside)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """All checkpoints of a run, the newest last."""
    return sorted(folder.glob("step_[0-9]*"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, those passed over said; None: there is none."""
    return next(whole(folder), None)


def whole(folder: Path) -> Iterator[Path]:
    """The checkpoints of a run that are whole, the newest first, those passed over said."""
    told, any_whole = found(folder), False
    for path in reversed(told):
        if not _damage(path, _stamps(path)):
            any_whole = True
            yield path
    if told and not any_whole:
        raise DataError(f"every checkpoint in {folder} is damaged: start a new run.")


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
        described = _described(path)
        _check(path, described, names)
        # Copies: a memory map would tie the run to a file that is soon replaced.
        files = [{k: t.clone() for k, t in load_file(path / n).items()} for n in names]
        return files, described["state"]
    except (OSError, ValueError, SafetensorError) as problem:
        raise DataError(
            f"the checkpoint {path} cannot be read ({problem}): name another, or train it again."
        ) from None


def beside(path: Path) -> dict[str, Any]:
    """The sums of the run's other files when a whole checkpoint was made; older ones have none."""
    found: dict[str, Any] = _described(path).get("beside", {})
    return found


def _described(path: Path) -> dict[str, Any]:
    """What a checkpoint's JSON says, its own sum checked."""
    described = unsummed(json.loads((path / STATE).read_text()))
    if not isinstance(described.get("sha256"), dict) or "state" not in described:
        raise ValueError(f"{STATE} does not describe a checkpoint")
    return described


def _check(path: Path, described: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if _sha256(path / name) != described["sha256"].get(name):
            raise ValueError(f"{name} is damaged")


def _stamps(path: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file of a checkpoint does."""
    stats = {file.name: file.stat() for file in path.iterdir()}
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))


@cache
def _damage(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """What is wrong with a checkpoint, said once; looked for once as long as its files stay."""
    try:
        described = _described(path)
        _check(path, described, described["sha256"])
    except (OSError, ValueError) as problem:
        say(f"warning: {path} is damaged ({problem}): it is passed over.")
        return str(problem)
    return ""


def optimizer_tensors(optimizer: torch.optim.Optimizer, scaler: Scaler | None) -> dict[str, Tensor]:
    """An optimizer's state as flat names, parameter's number, then key; and fp16's scale.

    What apex's keep besides is there by the names that `apex.counters` has for it.
    """
    state = optimizer.state_dict()["state"]
    found = {f"{number}.{key}": t for number, table in state.items() for key, t in table.items()}
    return found | counters(optimizer) | ({} if scaler is None else scaler.tensors())


def tables(
    method: Method, optimizer: torch.optim.Optimizer, scaler: Scaler | None
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file; ranks bring their rows to the first, which writes."""
    model, moments = method.state_dict(), optimizer_tensors(optimizer, scaler)
    for table, name, sizes in _dealt(method, optimizer, model, moments):
        table[name] = collected(table[name], sizes, world())
    return {MODEL: model, OPTIMIZER: moments}


def own_rows(
    method: Method,
    optimizer: torch.optim.Optimizer,
    model: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Leave in a checkpoint's tables what is this rank's own of rows that are dealt out."""
    for table, name, sizes in _dealt(method, optimizer, model, moments):
        table[name] = table[name][slice(*world().own(sizes))]


def _dealt(
    method: Method,
    optimizer: torch.optim.Optimizer,
    model: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> Iterator[tuple[dict[str, Tensor], str, tuple[int, ...]]]:
    """Whose rows are dealt out: weights, and moments of these under their parameters' numbers."""
    if not method.shards:
        return
    names = {id(param): name for name, param in method.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, sizes in method.shards.items():
        yield model, name, sizes
    for name, tensor in list(moments.items()):
        number = name.partition(".")[0]
        sizes = method.shards.get(names[id(params[int(number)])], ()) if number.isdecimal() else ()
        if sizes and tensor.ndim:
            yield moments, name, sizes


def load_optimizer(
    optimizer: torch.optim.Optimizer, scaler: Scaler | None, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; parameter groups stay as they are."""
    tensors = dict(tensors)
    if scaler is not None:
        for name, kept in scaler.tensors().items():
            kept.copy_(tensors.pop(name))
    counted = {name: tensors.pop(name) for name in counters(optimizer)}
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
    for name, count in counters(optimizer).items():
        count.copy_(counted[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop(path: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves nothing that looks like one."""
    if path.exists():
        aside = path.rename(path.with_name(f".{path.name}.old.{os.getpid()}"))
        shutil.rmtree(aside, ignore_errors=True)
