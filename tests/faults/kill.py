"""Kill runs at random times, resume them, and compare them bit for bit with undisturbed ones.

python tests/faults/kill.py [--trials 200]
"""

import argparse
import os
import random
import signal
import time
from dataclasses import dataclass
from itertools import cycle, islice

from forks import (
    CASES,
    Bench,
    Outcome,
    bench,
    command_of,
    finish,
    start,
    steps_told,
    told,
    unreadable,
)

from fastidmm.folders import RECIPE
from fastidmm.record import Record

MOST = 5  # kills of one run
SOON = 15.0  # seconds in which a killed run's workers notice


@dataclass(slots=True)
class Figures:
    """What the trials found."""

    runs: int = 0
    kills: int = 0
    differing: int = 0  # metric lines, and files of weights and moments
    unreadable: int = 0  # checkpoints, looked at after every kill
    lost: float = 0.0  # epochs to be made again after a kill, at most
    lingering: int = 0  # killed runs of which a worker went on
    seconds: float = 0.0


def trials(num: int, seed: int = 0) -> Figures:
    """So many runs, each of the cases in turn, killed one to five times."""
    chance, found, began = random.Random(seed), Figures(), time.monotonic()
    with bench() as work:
        for name in islice(cycle(CASES), num):
            trial(work, name, chance, found)
    found.seconds = time.monotonic() - began
    return found


def trial(work: Bench, name: str, chance: random.Random, found: Figures) -> None:
    """Begin a case, kill it at random times, resume it to its end, and compare."""
    case, (truth, seconds) = CASES[name], work.truth(name)
    place = work.place("trial", case)
    folder = place / case.folder
    killed = []
    for _ in range(chance.randint(1, MOST)):
        child = start(command_of(case, place), place)
        ended = child.wait(chance.uniform(0, seconds))
        # At times its workers are spared: they must neither stay nor stand in the way.
        kill = os.kill if chance.random() < 0.5 else os.killpg
        if not ended:
            kill(child.pid, signal.SIGKILL)
        if child.status() == -signal.SIGKILL:
            found.kills += 1
            killed.append(child)
        else:
            child.gone(SOON)
        found.unreadable += unreadable(folder)
        if (folder / RECIPE).exists():
            record = Record(folder)
            epoch = 3 if record.recipe.run.holdout else 4
            found.lost = max(found.lost, (steps_told(folder) - record.steps) / epoch)
    finish(case, place)
    found.runs += 1
    found.differing += truth.differing(Outcome.of(folder))
    found.lingering += sum(not child.gone(SOON) for child in killed)


def main() -> None:
    """Print the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--trials", type=int, default=200)
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    found = trials(options.trials, options.seed)
    told("runs killed at random times", f"{found.runs}, {found.kills} times, {found.seconds:.0f} s")
    told("promised 0 metric lines and weights that differ by a bit", found.differing)
    told("promised 0 unreadable checkpoints", found.unreadable)
    told("promised at most an epoch (the cadence asked for) lost by a kill", f"{found.lost:g}")
    told(f"promised 0 workers alive {SOON:.0f} s after a kill", found.lingering)
    raise SystemExit(bool(found.differing or found.unreadable or found.lingering))


if __name__ == "__main__":
    main()
