"""What a run leaves behind: its recipe, metrics, checkpoints and environment, in one folder.

    RUN/recipe.toml metrics.jsonl environment.json checkpoints/step_000000800/

A stage that starts from a run (fine-tuning) is a folder of the same shape inside it.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastidmm
from fastidmm import checkpoint, lock
from fastidmm.errors import DataError, UsageError
from fastidmm.folders import RECIPE, SCRATCH, is_stage, start_of
from fastidmm.machine import cpu_threads, device_of, name_of
from fastidmm.plan import num_steps
from fastidmm.preparing.files import naming
from fastidmm.progress import say
from fastidmm.ranks import launched, world
from fastidmm.recipe import Recipe, read_tables
from fastidmm.store import Store, check_name

METRICS, ENVIRONMENT = "metrics.jsonl", "environment.json"
MINUTE = 60.0
ALWAYS = {"epoch", "step", "loss", "skipped"}  # in every metric line
STARTED = {"fastidmm", "torch", "device", "command", "train_fingerprint", "num_train"}


class Record:
    """The folder of one run or stage, and the metric lines on their way to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = Recipe.of(read_tables(str(folder / RECIPE)))
        self._waiting: deque[tuple[dict[str, Any], torch.cuda.Event | None]] = deque()
        self._begun: dict[str, str] = {}  # sums of what never changes
        self._told, self._num_bytes = hashlib.sha256(), 0  # of the metric lines written
        self.tell: Callable[[list[dict[str, Any]]], None] = lambda lines: None  # of them, to others
        self._writes = world().first  # the other ranks follow, and leave the folder alone

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, store: Store) -> "Record":
        """Make the folder with all it must always have, or nothing at all."""
        check_name(folder.name, "run")
        if folder.exists():
            resume = f"`fastidmm resume {folder}` goes on with it; "
            told = resume if (folder / RECIPE).exists() else ""
            raise UsageError(f"{folder} exists: {told}give --run another name to start a new one.")
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        for path in folder.parent.glob(".*.*"):
            if _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            with naming(folder):
                (aside / RECIPE).write_text(recipe.toml())
                started = environment(store, device_of(recipe.run.device))
                (aside / ENVIRONMENT).write_text(json.dumps(started, indent=2))
                for path in (aside / RECIPE, aside / ENVIRONMENT, aside):
                    checkpoint.sync(path)
                aside.rename(folder)
                checkpoint.sync(folder.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return cls(folder)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder / "checkpoints"

    def check(self) -> None:
        """Refuse a recipe or an environment other than what the newest checkpoint came of."""
        self._begun = {name: _sum(self.folder / name) for name in (RECIPE, ENVIRONMENT)}
        newest = checkpoint.newest(self.checkpoints)
        kept = checkpoint.beside(newest) if newest else {}
        for name, now in self._begun.items():
            if kept.get(name, now) != now:
                path = self.folder / name
                raise DataError(
                    f"{path} is not what the run began with, and neither its recipe nor its "
                    f"environment may change: put it back, or start a new run with --recipe FILE."
                )

    @property
    def sums(self) -> dict[str, Any]:
        """Of the files beside the checkpoints, as they were read or written here."""
        lines = {"bytes": self._num_bytes, "sha256": self._told.hexdigest()}
        return {**self._begun, METRICS: lines}

    def environment(self) -> dict[str, Any]:
        """What the run was started with."""
        path = self.folder / ENVIRONMENT
        try:
            started: dict[str, Any] = json.loads(path.read_text())
            if not isinstance(started, dict) or not started.keys() >= STARTED:
                raise ValueError("it lacks what every run begins with")
        except (OSError, ValueError) as problem:
            raise DataError(f"{path} cannot be read ({problem}): start a new run.") from None
        return started

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        run = self.recipe.run
        return run.epochs * num_steps(self.environment()["num_train"], run.batch_size)

    @property
    def steps(self) -> int:
        """Steps made, up to the newest checkpoint."""
        newest = checkpoint.newest(self.checkpoints)
        return 0 if newest is None else checkpoint.step_of(newest)

    @property
    def finished(self) -> bool:
        """Whether all steps are made and kept, and no evaluation of them was left."""
        state = self.state
        last = self.steps == self.total_steps and not state.get("line")
        return state.get("ended", False) or last

    @property
    def state(self) -> dict[str, Any]:
        """What the newest checkpoint holds besides tensors; empty before the first."""
        newest = checkpoint.newest(self.checkpoints)
        state: dict[str, Any] = checkpoint.load(newest)[1] if newest else {}
        return state

    @property
    def seconds(self) -> float:
        """Spent training, up to the newest checkpoint."""
        return float(self.state.get("seconds", 0.0))

    @property
    def best(self) -> Path:
        """Where the checkpoint that did best on held-out images lies."""
        return self.folder / "best"

    @property
    def result(self) -> Path:
        """The checkpoint that counts: the best on held-out images, or else the newest."""
        newest = checkpoint.newest(self.checkpoints)
        if newest is None:
            raise UsageError(f"{self.folder} has no checkpoint: `fastidmm resume {self.folder}`.")
        step = self.state.get("best_step", 0)
        return checkpoint.at(self.best, step) if step else newest

    @property
    def resolution(self) -> int:
        """Side of its crops, px."""
        return self.recipe.run.resolution

    @property
    def init(self) -> Path | None:
        """The checkpoint this starts from, if any."""
        return start_of(self.folder, self.recipe.run.init)

    @property
    def pretrained(self) -> bool:
        """Whether it goes back to pretrained weights, directly or by an earlier stage."""
        # The stage it went on from may be gone: the name tells of which arm it is.
        return bool(self.recipe.run.init) and not self.folder.name.startswith(SCRATCH)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run: a second process that would train it is refused."""
        return lock.locked(self.folder) if self._writes else nullcontext()

    @property
    def running(self) -> bool:
        """Whether another process trains it at this moment."""
        return lock.running(self.folder)

    @property
    def unfinished(self) -> str:
        """What to say, and to do, where it should be finished and is not."""
        run = self.folder.parent if is_stage(self.folder) else self.folder
        if self.running:
            return (
                f"{self.folder} is still being trained: wait for its end; "
                f"`fastidmm report --watch --run {run}` shows how far it is."
            )
        return f"{self.folder} is not finished: `fastidmm resume {run}` goes on with it."

    def metrics(self) -> list[dict[str, Any]]:
        """All metric lines written so far, but for what a kill, a power cut or damage broke."""
        *lines, _ = self._read().split(b"\n")
        return [found for line in lines if (found := _parsed(line))]

    def _read(self) -> bytes:
        path = self.folder / METRICS
        return path.read_bytes() if path.exists() else b""

    def log(self, values: dict[str, Any]) -> None:
        """Add a metric line, for `flush` to write when the device has come so far."""
        on_gpu = any(isinstance(v, Tensor) and v.is_cuda for v in values.values())
        copies = {
            key: value.detach().to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        self._waiting.append((copies, event))

    def flush(self, *, wait: bool) -> list[dict[str, Any]]:
        """Write the lines whose numbers are there; returns them.

        Or wait for all, and see them onto the disk: a checkpoint follows that counts on them.
        """
        written = []
        while self._waiting:
            values, event = self._waiting[0]
            if event is not None and not event.query():
                if not wait:
                    break
                event.synchronize()
            self._waiting.popleft()
            written.append(plain(values))
        if not self._writes:
            return written
        if written:
            path = self.folder / METRICS
            text = _text(written)
            with naming(path), path.open("a") as file:
                file.write(text)
            self._count(text)
            self.tell(written)
        if wait:
            with naming(self.folder / METRICS):
                checkpoint.sync(self.folder / METRICS)
        return written

    def _count(self, text: str) -> None:
        self._told.update(text.encode())
        self._num_bytes += len(text.encode())

    def cut(self, step: int, kept: dict[str, Any]) -> None:
        """Drop the metric lines past `step`, written or waiting: the run goes on from there.

        `kept` are the sums in the checkpoint. Lines are for people: that some are not as they were
        is said, and costs no run.
        """
        self._waiting.clear()
        if not self._writes:
            return
        lines = kept.get(METRICS)
        if lines and _hash(self._read()[: lines["bytes"]]) != lines["sha256"]:
            say(
                f"warning: {self.folder / METRICS} was changed or damaged: lines that cannot be "
                "read are dropped. Weights are not affected."
            )
        text = _text([line for line in self.metrics() if line["step"] <= step])
        self._told, self._num_bytes = hashlib.sha256(), 0
        self._count(text)
        aside = self.folder / f".{METRICS}"
        with naming(aside):
            aside.write_text(text)
            checkpoint.sync(aside)
            aside.replace(self.folder / METRICS)
            checkpoint.sync(self.folder)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sum(path: Path) -> str:
    return _hash(path.read_bytes()) if path.exists() else ""


def _text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A metric line, or None where it is none: a power cut may leave zeros, too."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= ALWAYS else None


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON can hold; what is not finite becomes null."""
    numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}
    bad = [k for k, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**numbers, **dict.fromkeys(bad)}


def environment(store: Store, device: torch.device) -> dict[str, Any]:
    """What a result may depend on besides the recipe."""
    return {
        "fastidmm": fastidmm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": name_of(device),
        "threads": cpu_threads(),
        "ranks": world().size,
        "launch": launched(),
        "command": sys.argv,
        "train_fingerprint": store.fingerprint,
        "num_train": len(store),
    }


def _abandoned(path: Path) -> bool:
    """Whether a run was being made here by a process that was killed before the folder's name."""
    number = path.name.rpartition(".")[2]
    try:
        # A process of another machine may be at it, which takes no minute; and nothing else goes.
        return (
            number.isdecimal()
            and {file.name for file in path.iterdir()} <= {RECIPE, ENVIRONMENT}
            and time.time() - path.stat().st_mtime > MINUTE
            and not lock.alive(int(number))
        )
    except OSError:
        return False


def encoder_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint, under the encoder's own names."""
    (tensors,), _ = checkpoint.load(path, checkpoint.MODEL)
    prefix = "backbone."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
