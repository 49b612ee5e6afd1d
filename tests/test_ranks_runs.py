"""Runs by several ranks: on with another number, stopped, killed, and what each says."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
import torch
from forks import PRETRAIN, Bench, bench, start
from ranks import SOON, Figures, ended, losses, ranks, said, trial

from fastidmm import checkpoint, pulse
from fastidmm import ranks as module
from fastidmm.batch import Batch, Loss, Method
from fastidmm.methods.idmm import IDMM
from fastidmm.methods.simclr import SimCLR
from fastidmm.ranks import world
from fastidmm.record import METRICS, Record
from fastidmm.verify import verify


@pytest.fixture(scope="module")
def work() -> Iterator[Bench]:
    """A dataset of 32 photographs; all that children import is imported."""
    with bench() as made:
        yield made


def until_step(folder: Path, step: int) -> None:
    """Wait until a run has told of that step."""
    until = time.monotonic() + forks.LOST
    while not forks.steps_told(folder) >= step:
        assert time.monotonic() < until, said(folder.parent.parent)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(work: Bench) -> list[float]:
    """The losses of one process."""
    work.truth("pretrain idmm")
    return losses(work.work / "truth pretrain idmm" / "runs" / "run")


def fresh(work: Bench, name: str) -> Path:
    place = work.work / name
    place.mkdir()
    return place


def test_a_signal_to_one_rank_stops_all_and_another_number_goes_on(
    work: Bench, whole: list[float]
) -> None:
    """Begun by two, asked to stop, replayed by one, gone on with by three, then by one."""
    place = fresh(work, "stopped")
    run = place / "runs" / "run"
    children = ranks(2, PRETRAIN, place)
    until_step(run, 2)
    os.kill(children[1].pid, signal.SIGTERM)
    assert ended(children) == [75, 75]
    made = Record(run).steps
    assert 2 <= made < 16 and said(place).count("`fastidmm resume runs/run` goes on") == 1
    assert f"stopped at step {made}; " in said(place)  # together, and none left behind
    (replayed,) = verify(run, 20)
    assert not replayed.difference and "of those of 2 ranks" in str(replayed)
    children = ranks(3, "resume run", place)
    until_step(run, made + 2)
    os.kill(children[0].pid, signal.SIGTERM)
    os.kill(children[0].pid, signal.SIGTERM)  # a launcher's own: it costs nothing
    assert ended(children) == [75] * 3
    again = Record(run).steps
    assert made < again < 16
    child = start("resume run", place)
    assert child.status() == 0
    child.gone(5)
    assert losses(run) == pytest.approx(whole, rel=1e-3)
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("dead", [0, 1])
def test_all_end_where_one_is_killed(work: Bench, dead: int) -> None:
    """Within a minute, one sentence with the rank, the step and how to go on."""
    place = fresh(work, f"killed {dead}")
    run = place / "runs" / "run"
    children = ranks(3, PRETRAIN, place)
    until_step(run, 3)
    began = time.monotonic()
    os.kill(children[dead].pid, signal.SIGKILL)
    expected = [-signal.SIGKILL if rank == dead else 75 for rank in range(3)]
    assert ended(children) == expected and time.monotonic() - began < SOON
    words = said(place)
    assert words.count(f"fastidmm: rank {dead} ended at step ") == 1, words
    assert "Traceback" not in words and "`fastidmm resume runs/run` goes on" in words
    assert forks.unreadable(run) == 0


@pytest.mark.parametrize("frozen", [0, 1])
def test_all_end_where_one_is_stopped_and_gives_no_sign(
    work: Bench, monkeypatch: pytest.MonkeyPatch, frozen: int
) -> None:
    """It is ended by another, and then as if it had been killed: named, with the step."""
    monkeypatch.setattr(pulse, "EVERY", 0.3)
    monkeypatch.setattr(module, "EVERY", 0.3)
    place = fresh(work, f"frozen {frozen}")
    run = place / "runs" / "run"
    children = ranks(2, PRETRAIN, place)
    until_step(run, 3)
    began = time.monotonic()
    os.kill(children[frozen].pid, signal.SIGSTOP)
    expected = [-signal.SIGKILL if rank == frozen else 75 for rank in range(2)]
    assert ended(children) == expected and time.monotonic() - began < SOON
    words = said(place)
    named = f"fastidmm: rank {frozen} gave no sign for 3 s and was ended at step "
    assert words.count(named) == 1 and words.count("fastidmm: ") == 1, words


def test_a_rank_of_another_machine_is_missed_though_nobody_can_end_it(
    work: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (pulse, module):
        monkeypatch.setattr(where, "EVERY", 0.2)
        monkeypatch.setattr(where, "machine", lambda: f"host{os.environ['RANK']}/its own")
    place = fresh(work, "elsewhere")
    children = ranks(2, PRETRAIN, place)
    until_step(place / "runs" / "run", 3)
    os.kill(children[1].pid, signal.SIGSTOP)
    assert children[0].status() == 75
    assert said(place).endswith(
        "fastidmm: rank 1 on host1 gives no sign; `fastidmm resume` goes on.\n"
    )
    os.kill(children[1].pid, signal.SIGKILL)
    assert children[1].status() == -signal.SIGKILL
    for child in children:
        child.gone(5)


def test_what_every_rank_meets_is_said_once(work: Bench) -> None:
    place = fresh(work, "wrong")
    assert ended(ranks(2, f"{PRETRAIN} --set optim.nothing=1", place)) == [2, 2]
    words = said(place)
    assert words.count("fastidmm: unknown key optim.nothing") == 1 and words.count("\n") == 1
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("words", "method", "remedy"),
    [
        ("--method simclr", SimCLR, "--batch-size, begin with --set run.micro_batches=2, or"),
        ("--set method.head=sharded", IDMM, "lower --resolution or --batch-size, or close"),
    ],
)
def test_all_end_where_memory_ends_in_the_middle_of_a_pass(
    work: Bench, monkeypatch: pytest.MonkeyPatch, words: str, method: type[Method], remedy: str
) -> None:
    """With the status of the rank that it ended on, and one sentence."""
    forward = method.forward

    def scarce(self: Method, batch: Batch) -> Loss:
        if world().rank == 1 and batch.step == 3:
            raise torch.OutOfMemoryError("on purpose")
        return forward(self, batch)

    monkeypatch.setattr(method, "forward", scarce)
    place = fresh(work, f"short {method.__name__}")
    children = ranks(2, f"{PRETRAIN} {words}", place)
    until_step(place / "runs" / "run", 3)
    began = time.monotonic()
    assert ended(children) == [5, 5] and time.monotonic() - began < SOON
    told = said(place)
    assert told.count("fastidmm: the GPU's memory cannot hold a step") == 1 and remedy in told, told
    assert "Traceback" not in told and told.count("fastidmm: ") == 1


def test_all_end_with_the_status_of_a_full_disk(
    work: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the first rank alone meets, where it keeps metric lines; one sentence, of the disk."""
    sync = checkpoint.sync

    def full(path: Path) -> None:
        if path.name == METRICS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", full)
    place = fresh(work, "full")
    assert ended(ranks(2, PRETRAIN, place)) == [3, 3]
    words = said(place)
    assert words.count("fastidmm: ") == 1 and "free some space" in words, words
    assert "Traceback" not in words and forks.unreadable(place / "runs" / "run") == 0


@pytest.mark.slow
def test_random_trials_of_ranks(work: Bench, whole: list[float]) -> None:
    found = Figures()
    for kill in (True, False):
        trial(work, 2, random.Random(3), found, kill=kill)
        assert losses(work.work / "trial" / "runs" / "run") == pytest.approx(whole, rel=1e-3)
    assert found.named == found.kills and found.kept == found.stops
    assert not found.unreadable and found.slowest < SOON


@pytest.mark.slow
def test_the_launcher_answers_by_the_ranks_status(
    work: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, of two processes that import everything."""
    place = fresh(work, "launched")
    monkeypatch.chdir(place)
    words = f"{PRETRAIN} --device cpu --gpus 2 --epochs 1".split()
    found = subprocess.run(
        [sys.executable, "-m", "fastidmm", *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("runs/run: 1 epochs") == 1 and found.stderr.count("loader res") == 1
    assert Record(place / "runs" / "run").finished
