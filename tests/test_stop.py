"""Signals: what is kept, what is said, the exit status, and a scheduler that requeues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stop

from fastidmm.interrupt import SIGNALS, stoppable, unheard

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
