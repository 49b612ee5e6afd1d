"""Signals: what is kept, what is said, the exit status, and a scheduler that requeues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import stop
from toy_runs import RUN, Killed, kill_before_update, recipe

import fastidmm.record
from fastidmm import evaluate, stages
from fastidmm.batch import Batch, Loss
from fastidmm.errors import Interrupted, UsageError
from fastidmm.interrupt import SIGNALS, STOPPED, stoppable, unheard
from fastidmm.methods.idmm import IDMM
from fastidmm.record import Record

# From Python 3.12 on, forking a process that has threads warns; torch's idle ones are no danger.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SCHEDULER = """
"$PYTHON" -m fastidmm pretrain --dataset toy --backbone vit_micro --run job --resolution 16 \\
    --batch-size 8 --epochs 20 --set run.checkpoint_every=20 --device cpu &
job=$!
until [ -s runs/job/metrics.jsonl ]; do sleep 0.05; done
kill -TERM $job; wait $job; echo "ended $?"
"$PYTHON" -m fastidmm resume job && echo "requeued $?"
"""


@pytest.mark.slow
@FORKS
def test_signals_at_every_point_keep_every_step() -> None:
    found = stop.trials(19)
    assert found.stops >= 13
    assert found.status == found.sentence == found.stops
    assert (found.lost, found.unreadable, found.differing) == (0, 0, 0)
    assert found.left >= 3  # at the two points within evaluations, and in the last step
    assert found.at_once == found.twice == 3


@pytest.mark.slow
def test_a_scheduler_stops_and_requeues(toy: str) -> None:
    """TERM to the job, status 75, and the line of its script that goes on."""
    done = subprocess.run(
        ["bash", "-c", SCHEDULER],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "ended 75\n" in done.stdout and "requeued 0\n" in done.stdout, done.stderr
    assert "`fastidmm resume runs/job` goes on" in done.stderr


def test_a_command_that_imports_is_stopped_by_a_sentence(tmp_path: Path) -> None:
    found = stop.Figures()
    stop.importing(tmp_path, "pydantic", signal.SIGTERM, found)
    assert (found.stops, found.status, found.sentence, found.unreadable) == (1, 1, 1, 0)


def lines(folder: Path) -> list[dict[str, Any]]:
    """All metric lines, their timings left out."""
    timings = ("images_per_second", "data_wait")
    told = Record(folder).metrics()
    return [{key: line[key] for key in line if key not in timings} for line in told]


def test_a_signal_after_the_last_look_is_heard_after_the_next_step(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While step 4's line is written: no checkpoint is due, and none was decided on."""
    real, calls = Record.flush, iter(range(1000))

    def asking(self: Record, *, wait: bool) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, wait=wait)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 5"):
        patch.setattr(Record, "flush", asking)
        stages.pretrain(recipe(epochs=3, checkpoint_every=3), "run")
    assert [line["step"] for line in lines(RUN)] == [1, 2, 3, 4, 5]
    assert Record(RUN).steps == 5


def ask_in_part(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have a signal come before a part of four images that an evaluation looks at, from 0."""
    real, calls = vars(evaluate)["plain_views"], iter(range(1000))

    def asked(*given: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(evaluate, "CROPS_AT_ONCE", 4)
    monkeypatch.setattr(evaluate, "plain_views", asked)


def test_an_evaluation_left_is_made_good_before_the_next_step(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After steps 6 and 9; the first is left twice. Until the last is done, the run is not."""
    settings = recipe(epochs=3, knn_every=2)
    stages.pretrain(settings, "whole")
    for part, step in ((3, 6), (0, 6), (6, 9)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step}"):
            ask_in_part(patch, part)
            stages.resume(RUN) if RUN.exists() else stages.pretrain(settings, "run")
        record = Record(RUN)
        assert (record.steps, record.state["line"]["step"]) == (step, step)
        assert lines(RUN) == lines(Path("runs/whole"))[: step - 1]
    with pytest.raises(UsageError, match="not finished"):
        stages.finetune(RUN, {}, [])
    stages.resume(RUN)
    assert Record(RUN).finished and Record(RUN).state["line"] == {}
    assert lines(RUN) == lines(Path("runs/whole"))


def test_a_best_score_is_found_though_its_evaluation_was_left(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left in the scoring of the images held out, behind kNN over the fifteen others."""
    stages.pretrain(recipe(epochs=1), "run")
    settings = {"run.holdout": 0.25, "run.score_every": 1, "run.epochs": 2, "run.knn_every": 1}
    stages.finetune(RUN, settings, [])
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 2"):
        ask_in_part(patch, 4)
        stages.finetune(RUN, settings, [])
    whole, left = RUN / "finetune-16", RUN / "finetune-16-2"
    assert Record(left).state["best_step"] == 0
    stages.resume(RUN)
    assert lines(left) == lines(whole) and "holdout_top1" in lines(left)[1]
    assert Record(left).state["best_step"] == Record(whole).state["best_step"] > 0


def test_a_skipped_step_whose_evaluation_is_left_counts_once(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = IDMM.forward

    def failing(self: IDMM, batch: Batch) -> Loss:
        loss = forward(self, batch)
        return Loss(loss.total * (float("nan") if batch.step == 5 else 1.0), loss.parts)

    monkeypatch.setattr(IDMM, "forward", failing)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 6"):
        ask_in_part(patch, 2)
        stages.pretrain(recipe(epochs=3, knn_every=2), "run")
    stages.resume(RUN)
    assert Record(RUN).state["strikes"] == 1
    assert [line["skipped"] for line in lines(RUN)] == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert lines(RUN)[5]["loss"] is None and "knn_top1" in lines(RUN)[5]


def test_a_second_signal_has_the_systems_effect() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stoppable() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            assert asked.requested and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@FORKS
def test_a_process_begun_unheard_outlives_them() -> None:
    with unheard():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    for number in SIGNALS:
        os.kill(child, number)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS) == set()
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


ON_A_TERMINAL = [
    sys.executable, "-m", "fastidmm", "pretrain", "--dataset", "toy", "--backbone", "vit_micro",
    "--resolution", "16", "--batch-size", "8", "--epochs", "900", "--run", "run", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("closes", [False, True])
@FORKS
def test_at_a_terminal_a_signal_is_answered_and_one_that_closes_is_no_error(
    toy: str, closes: bool
) -> None:
    """The answer comes before the step's end; who closes the window keeps the step and 75."""
    ours, its = os.openpty()
    with subprocess.Popen(ON_A_TERMINAL, stdin=its, stdout=its, stderr=its) as child:
        os.close(its)
        said = b""
        while b"images/s" not in said and (part := _read(ours)):
            said += part
        if closes:
            os.close(ours)
        child.send_signal(signal.SIGHUP if closes else signal.SIGINT)
        while not closes and (part := _read(ours)):
            said += part
    assert child.returncode == 75
    assert Record(RUN).steps == len(lines(RUN)) >= 1
    if not closes:
        os.close(ours)
        answered, kept = said.index(b" stopping once this step"), said.index(b"stopped at step")
        assert answered < kept


def _read(terminal: int) -> bytes:
    """What is written to it; nothing once nobody has it open any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_a_run_that_goes_on_with_other_threads_says_what_that_means(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing where all is as it was."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 4)
        stages.pretrain(recipe(), "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fastidmm.record, "cpu_threads", lambda: 99)
        kill_before_update(patch, 4)
        stages.resume(RUN)
    threads = Record(RUN).environment()["threads"]
    told = capsys.readouterr().err
    assert (
        told.count(f"threads {threads} is 99 today: the run goes on to the same numbers but") == 1
    )
    stages.resume(RUN)
    assert Record(RUN).finished and "today" not in capsys.readouterr().err


CALLED_BY_C = """
import ctypes, os, signal, time
from fastidmm.interrupt import heed

heed()

@ctypes.CFUNCTYPE(None)
def called():
    os.kill(os.getpid(), signal.SIGTERM)

called()
time.sleep(30)
"""


def test_a_signal_heard_in_what_c_has_called_stops_the_command_all_the_same() -> None:
    """As a compiler's notice, in which an exception is dropped."""
    done = subprocess.run(
        [sys.executable, "-c", CALLED_BY_C], capture_output=True, check=False, timeout=25
    )
    assert (done.returncode, done.stderr) == (75, STOPPED)
