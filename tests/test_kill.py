"""Kills at random times, and what a kill or a power cut at the worst moment leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import kill
import pytest

from fastidmm import checkpoint, lock, stages
from fastidmm.assemble import training_rows
from fastidmm.errors import UsageError
from fastidmm.folders import RECIPE
from fastidmm.recipe import Recipe
from fastidmm.record import METRICS, Record

# From Python 3.12 on, forking a process that has threads warns; torch's idle ones are no danger.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def run(toy: str) -> Path:
    """Two epochs of three steps."""
    told = {
        "dataset": toy, "backbone": "vit_micro", "epochs": 2, "batch_size": 8, "resolution": 16,
        "checkpoint_every": 1,
    }  # fmt: skip
    stages.pretrain(Recipe.of({"run": told}), "run")
    return Path("runs/run")


@pytest.mark.slow
@FORKS
def test_runs_killed_at_random_times_resume_to_the_same_bits() -> None:
    found = kill.trials(20)
    assert found.runs == 20 and found.kills > 20
    assert (found.differing, found.unreadable, found.lingering) == (0, 0, 0)
    assert found.lost <= 1


class Killed(BaseException):
    """An end that nobody handles."""


def test_killed_while_it_removes_a_checkpoint_none_looks_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = run / "checkpoints", shutil.rmtree

    def torn(path: Path, **options: Any) -> None:
        if not (path / checkpoint.MODEL).exists():
            return real(path, **options)
        (path / checkpoint.MODEL).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", torn)
        checkpoint.save(folder, 6, {checkpoint.MODEL: {}}, {})
    left = checkpoint.found(folder)
    assert [checkpoint.step_of(path) for path in left] == [3]
    assert checkpoint.load(left[0], checkpoint.MODEL, checkpoint.OPTIMIZER)[1]["step"] == 3


def test_what_a_killed_beginning_left_goes_with_the_next(run: Path) -> None:
    """A minute later, its process gone; what is at work or anybody else's stays."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f".one.{ended.pid}", f".two.{ended.pid}", f".three.{os.getpid()}", f".4.{ended.pid}"]
    left, early, alive, foreign = (Path("runs") / name for name in names)
    for path in (left, early, alive, foreign):
        path.mkdir()
        (path / RECIPE).write_text("")
    (foreign / "notes").touch()
    for path in (left, alive, foreign):
        os.utime(path, (0, 0))
    recipe = Record(run).recipe
    Record.create(Path("runs/next"), recipe, training_rows(recipe))
    assert not left.exists()
    assert early.exists() and alive.exists() and foreign.exists()


def test_zeros_behind_the_last_line_are_skipped(run: Path) -> None:
    """As a power cut leaves them, with lines of a later resume behind."""
    path = run / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], bytes(30), b"\n", lines[4], lines[5][:-9]]))
    assert [line["step"] for line in Record(run).metrics()] == [1, 2, 3, 4, 5]


def test_metrics_are_on_disk_before_the_checkpoint_that_counts_on_them(
    toy: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    synced: list[str] = []
    real = checkpoint.sync

    def noted(path: Path) -> None:
        synced.append(path.name)
        real(path)

    monkeypatch.setattr(checkpoint, "sync", noted)
    request.getfixturevalue("run")
    kept = [i for i, name in enumerate(synced) if name == "checkpoints"]
    assert len(kept) == 3
    for before, at in pairwise(kept):
        assert synced[before:at].index(METRICS) < synced[before:at].index(checkpoint.MODEL)


@pytest.mark.skipif(sys.platform != "linux", reason="names of programs are Linux's to tell")
def test_a_program_whose_name_is_cut_amid_a_letter_is_alive() -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    try:
        name.write_bytes("ein Training mü".encode()[:-1])
        assert lock.alive(os.getpid())
    finally:
        name.write_bytes(before)


@FORKS
def test_looking_at_a_run_does_not_give_up_its_lock(run: Path) -> None:
    with Record(run).locked():
        assert not Record(run).running  # by another process, that is
        child = os.fork()
        if child == 0:
            lock._held.clear()
            os._exit(Record(run).running)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@FORKS
def test_a_worker_that_outlives_a_run_does_not_hold_it(run: Path) -> None:
    holder = os.fork()
    if not holder:
        with Record(run).locked():
            if not os.fork():  # the worker
                time.sleep(5)
                os._exit(0)
            (run / "held").touch()
            time.sleep(60)
    while not (run / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UsageError, match="another process"), Record(run).locked():
        pytest.fail("two hold the lock")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with Record(run).locked():
        pass
