"""Commands in forked children, which cost no import: what kill.py and stop.py share."""

import hashlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fastidmm import checkpoint, evaluate
from fastidmm.__main__ import main
from fastidmm.errors import DataError
from fastidmm.folders import RECIPE
from fastidmm.interrupt import SIGNALS
from fastidmm.record import METRICS, Record
from fastidmm.registry import METHODS, find

TIMINGS = ("images_per_second", "data_wait")
LOST = 120.0  # seconds after which a child has hung
RUN = "runs/run"
PRETRAIN = (
    "pretrain --dataset toy --backbone vit_micro --run run --resolution 16 --batch-size 8 "
    "--epochs 4 --set run.checkpoint_every=1 --set finetune.resolution=16 "
    "--set backbone.drop_path=0.3"
)
# Heads that fit a CPU.
SMALL = {
    "dino": " --set method.out_dim=48 --set method.hidden=64",
    "mocov3": " --set method.hidden=64",
}
TUNE = "finetune --run run --batch-size 8 --set run.checkpoint_every=1 --set run.score_every=1"


@dataclass(frozen=True, slots=True)
class Case:
    """A command, the folder it trains, and the case that must have been done before."""

    command: str
    folder: str = RUN
    after: str = ""


CASES = {
    **{
        f"pretrain {name}": Case(f"{PRETRAIN} --method {name}{SMALL.get(name, '')}")
        for name in METHODS
    },
    "loader torch": Case(f"{PRETRAIN} --loader torch"),
    "finetune": Case(f"{TUNE} --epochs 3", f"{RUN}/finetune-16", "pretrain idmm"),
    "finetune high": Case(
        f"{TUNE} --epochs 2 --resolution 32", f"{RUN}/finetune-32", "finetune"
    ),
    "holdout": Case(
        f"{TUNE} --epochs 8 --holdout 0.25 --set run.patience=2", f"{RUN}/finetune-16",
        "pretrain idmm",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Child:
    """A command in a process of its own; `alive` reads as ended once all its children have."""

    pid: int
    process: int
    alive: int

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        return bool(select.select([self.process], [], [], max(seconds, 0))[0])

    def status(self) -> int:
        """Its exit status, or minus the signal that ended it; a child that hangs is an error."""
        if not self.wait(LOST):
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"a command hung for {LOST:.0f} s")
        os.close(self.process)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def gone(self, seconds: float) -> bool:
        """Whether every process that it began ended within so many seconds."""
        found = bool(select.select([self.alive], [], [], seconds)[0])
        os.close(self.alive)
        return found


def start(command: str, place: Path, act: Callable[[], None] | None = None) -> Child:
    """Begin a command in `place`; what it says goes to `place/said`. The child does `act` first."""
    alive, held = os.pipe()
    child = os.fork()
    if child:
        os.close(held)
        return Child(child, os.pidfd_open(child), alive)
    status = 1
    try:
        os.setsid()
        os.chdir(place)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = ["fastidmm", *command.split()]
        if act:
            act()
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def command_of(case: Case, place: Path) -> str:
    """What goes on with it, or begins it."""
    return "resume run" if (place / case.folder / RECIPE).exists() else case.command


def finish(case: Case, place: Path) -> None:
    """Bring it to its end, undisturbed."""
    child = start(command_of(case, place), place)
    if child.status():
        raise AssertionError((place / "said").read_text())
    child.gone(LOST)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What must not differ: every metric line, and every file of weights and moments, hashed."""

    lines: list[str]
    sums: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        """What a finished run or stage holds; its timings left out."""
        record = Record(folder)
        lines = [
            json.dumps({key: value for key, value in line.items() if key not in TIMINGS})
            for line in record.metrics()
        ]
        newest = checkpoint.newest(record.checkpoints)
        assert newest is not None and record.finished
        files = [newest / checkpoint.MODEL, newest / checkpoint.OPTIMIZER]
        files += [record.result / checkpoint.MODEL]
        names = [str(path.relative_to(folder)) for path in files]
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return cls(lines, dict(zip(names, sums, strict=True)))

    def differing(self, other: "Outcome") -> int:
        """Lines and files that are not the same to the bit."""
        pairs = zip(self.lines, other.lines, strict=False)
        lines = sum(a != b for a, b in pairs) + abs(len(self.lines) - len(other.lines))
        return lines + len(self.sums.items() ^ other.sums.items())


def unreadable(folder: Path) -> int:
    """Folders called checkpoints, of a run or stage, that cannot be loaded."""
    found = 0
    for path in folder.glob("*/step_*"):
        names = [checkpoint.MODEL, checkpoint.OPTIMIZER]
        try:
            checkpoint.load(path, *names[: 1 if path.parent.name == "best" else 2])
        except DataError:
            found += 1
    return found


def steps_told(folder: Path) -> int:
    """The step of the last metric line."""
    if not (folder / METRICS).exists():
        return 0
    return max((line["step"] for line in Record(folder).metrics()), default=0)


class Bench:
    """Where trials run: a store, what each case begins with, and what it ends with undisturbed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._truths: dict[str, tuple[Outcome, float]] = {}
        os.environ["FASTIDMM_HOME"] = str(work / "home")
        make_photos(work / "photos")
        child = start("prepare --dataset folder --from photos --name toy", work)
        if child.status():
            raise AssertionError((work / "said").read_text())

    def place(self, name: str, case: Case) -> Path:
        """A fresh folder in which the case can begin."""
        place = self.work / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if case.after:
            self.truth(case.after)
            shutil.copytree(self.work / f"truth {case.after}" / "runs", place / "runs")
        return place

    def truth(self, name: str) -> tuple[Outcome, float]:
        """What a case ends with when nothing happens to it, and after how many seconds."""
        if name not in self._truths:
            case = CASES[name]
            place = self.place(f"truth {name}", case)
            began = time.monotonic()
            finish(case, place)
            spent = time.monotonic() - began
            self._truths[name] = Outcome.of(place / case.folder), spent
        return self._truths[name]


@contextmanager
def bench() -> Iterator[Bench]:
    """Somewhere to work, for a while; all that a child would import is imported here, once."""
    torch.set_num_threads(1)  # a forked child would wait for OpenMP's others
    from fastidmm import cli, run, scoring, stages  # noqa: F401
    from fastidmm.backbones import vit  # noqa: F401

    for kind, name in (*(("method", name) for name in METHODS), ("loader", "resident")):
        find(kind, name)
    find("loader", "torch")
    before = os.environ.get("FASTIDMM_HOME")
    # An evaluation of 32 images has parts then, between which it can be left.
    parts = mock.patch.object(evaluate, "CROPS_AT_ONCE", 8)
    with tempfile.TemporaryDirectory() as work, parts:
        try:
            yield Bench(Path(work))
        finally:
            os.environ.pop("FASTIDMM_HOME", None)
            if before is not None:
                os.environ["FASTIDMM_HOME"] = before


def make_photos(folder: Path, *, num: int = 32, side: int = 24) -> None:
    """Noise in two colours: so many to train on, a quarter as many to test."""
    chance = np.random.default_rng(0)
    for split, count in (("train", num), ("test", num // 4)):
        for number in range(count):
            place = folder / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = chance.integers(0, 150, (side, side + number % 3, 3), dtype=np.uint8)
            pixels[:, :, number % 2] += 100
            Image.fromarray(pixels).save(place / f"{number:03d}.png")


def told(promised: str, found: Any) -> None:
    """One figure."""
    print(f"{promised}: {found}", flush=True)
