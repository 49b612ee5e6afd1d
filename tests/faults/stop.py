"""Ask runs to stop, at chosen points and at random times, resume them, and compare.

python tests/faults/stop.py [--trials 50]
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from forks import (
    CASES,
    Bench,
    Outcome,
    bench,
    finish,
    make_photos,
    start,
    steps_told,
    told,
    unreadable,
)

from fastidmm import checkpoint, evaluate, stages
from fastidmm import step as stepping
from fastidmm import train as training
from fastidmm.interrupt import SIGNALS
from fastidmm.record import Record

SIGNALLED = "signalled"  # a file that says when
IMPORTED = ("pydantic", "torch._tensor", "torch", "fastidmm.train")
# What is called where a signal is wanted, and which call of it: 16 steps, 5 checkpoints, and two
# evaluations of four parts.
POINTS: dict[str, tuple[Any, str, int]] = {
    "before there is a run": (stages, "build_method", 0),
    "assembly": (training, "assemble", 0),
    "reading a checkpoint": (training, "restore", 0),
    "the first checkpoint": (checkpoint, "save", 0),
    "the first step": (stepping, "update", 0),
    "a step": (stepping, "update", 6),
    "the last step": (stepping, "update", 15),
    "evaluation": (evaluate, "plain_views", 1),
    "the last evaluation": (evaluate, "plain_views", 5),
    "writing metrics": (Record, "flush", 5),  # no checkpoint is due
    "writing a checkpoint": (checkpoint, "_sha256", 4),
    "the last checkpoint": (checkpoint, "_sha256", 9),
    "after the last": (stages, "summary", 0),
}


@dataclass(slots=True)
class Figures:
    """What the trials found."""

    stops: int = 0
    status: int = 0  # ended with 75
    sentence: int = 0  # and named `fastidmm resume`
    lost: int = 0  # steps told and not kept
    slowest: float = 0.0  # seconds from the signal to the end
    unreadable: int = 0
    differing: int = 0
    left: int = 0  # evaluations that were due, and left
    twice: int = 0  # asked twice, in a step without end
    at_once: int = 0  # and ended within a second by the signal itself

    def ended(self, status: int, said: str, seconds: float) -> None:
        """Count one stop."""
        self.stops += 1
        self.status += status == 75
        self.sentence += "fastidmm resume" in said and "Traceback" not in said
        self.slowest = max(self.slowest, seconds)


def hook(owner: Any, name: str, calls: int, act: Callable[[], None]) -> None:
    """Do `act` before a call of something."""
    real, left = getattr(owner, name), iter(range(calls, -1, -1))

    def hooked(*args: Any, **options: Any) -> Any:
        if next(left, None) == 0:
            act()
        return real(*args, **options)

    setattr(owner, name, hooked)


def ask(number: int) -> None:
    """Send it to this process, and note when."""
    Path(SIGNALLED).write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)


def ask_and_hold(number: int) -> None:
    """Send it, and let the part of an evaluation that comes next take long."""
    ask(number)
    hook(evaluate, "plain_views", 0, lambda: time.sleep(20))


def trials(num: int, seed: int = 0) -> Figures:
    """Every point once, and random times of every case in turn, until so many have stopped."""
    found, chance = Figures(), random.Random(seed)
    with bench() as work:
        for number, point in zip(cycle(SIGNALS), islice(POINTS, num), strict=False):
            at_point(work, point, number, found)
        for number, name in zip(cycle(SIGNALS), cycle(CASES), strict=False):
            if found.stops >= num:
                break
            at_random(work, name, number, chance, found)
        twice(work, found)
    return found


def at_point(work: Bench, point: str, number: signal.Signals, found: Figures) -> None:
    """One stop where a certain function is called."""
    case = CASES["pretrain idmm"]
    place = work.place("trial", case)
    child = start(case.command, place, lambda: hook(*POINTS[point], lambda: ask_and_hold(number)))
    status, began = child.status(), float((place / SIGNALLED).read_text())
    found.ended(status, (place / "said").read_text(), time.monotonic() - began)
    child.gone(0)
    gone_on_with(work, "pretrain idmm", place, found)


def at_random(
    work: Bench, name: str, number: signal.Signals, chance: random.Random, found: Figures
) -> None:
    """One stop at any time, asked of every process of the run as a scheduler does."""
    case, (_, seconds) = CASES[name], work.truth(name)
    place = work.place("trial", case)
    child = start(case.command, place)
    if not child.wait(chance.uniform(0.05, 0.9 * seconds)):
        began = time.monotonic()
        os.killpg(child.pid, number)
        status = child.status()
        # It may have been done by then: that is no stop.
        if status or "fastidmm resume" in (place / "said").read_text():
            found.ended(status, (place / "said").read_text(), time.monotonic() - began)
    else:
        child.status()
    child.gone(15)
    gone_on_with(work, name, place, found)


def gone_on_with(work: Bench, name: str, place: Path, found: Figures) -> None:
    """What was kept, and what comes of it."""
    case = CASES[name]
    folder = place / case.folder
    if folder.exists():
        left = Record(folder).state.get("line", {})
        found.left += bool(left)
        found.lost += max(steps_told(folder), left.get("step", 0)) - Record(folder).steps
    found.unreadable += unreadable(folder)
    finish(case, place)
    found.differing += work.truth(name)[0].differing(Outcome.of(folder))


def twice(work: Bench, found: Figures) -> None:
    """Each signal twice, in a step that has no end."""
    case = CASES["pretrain idmm"]
    for number in SIGNALS:
        place = work.place("trial", case)

        def stuck(number: signal.Signals = number) -> None:
            ask(number)
            time.sleep(60)

        child = start(case.command, place, lambda: hook(stepping, "update", 6, stuck))
        while not (place / SIGNALLED).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(child.pid, number)
        found.twice += 1
        found.at_once += child.status() == -number and time.monotonic() - began < 1
        child.gone(15)
        lost = found.lost  # an end at once keeps nothing more
        gone_on_with(work, "pretrain idmm", place, found)
        found.lost = lost


def importing(place: Path, module: str, number: signal.Signals, found: Figures) -> None:
    """One stop of a real process, when it has imported a module."""
    for each in SIGNALS:  # behind nohup and `&` they are ignored, and what is begun inherits that
        if signal.getsignal(each) is signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)
    words = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "fastidmm",
        *CASES["pretrain idmm"].command.split(),
    ]
    with subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.rsplit("|", 1)[-1].strip() == module:
                break
        began = time.monotonic()
        process.send_signal(number)
        said = process.stderr.read()
        found.ended(process.wait(), said, time.monotonic() - began)
    found.unreadable += (place / "runs").exists()


def decoding(place: Path, number: signal.Signals) -> tuple[int, float, bool]:
    """Stop a real `prepare` amid its files, and do it again: status, seconds, the same bytes."""
    make_photos(place / "many", num=400, side=200)
    stores = {}
    for name in ("whole", "stopped"):
        words = [
            sys.executable,
            "-m",
            "fastidmm",
            "prepare",
            "--dataset",
            "folder",
            "--from",
            "many",
        ]
        words += ["--name", name]
        home = place / "home" / "stores"
        if name == "stopped":
            with subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE) as process:
                journal = home / f".{name}.journal"
                while not journal.exists() or journal.stat().st_size < 500:
                    time.sleep(0.002)
                began = time.monotonic()
                process.send_signal(number)
                status = process.wait()
                seconds = time.monotonic() - began
        subprocess.run(words, cwd=place, capture_output=True, check=True)
        stores[name] = [p.read_bytes() for p in sorted((home / name).glob("*.safetensors"))]
    return status, seconds, stores["whole"] == stores["stopped"]


def processes(work: Bench, found: Figures) -> tuple[int, float, bool]:
    """Real processes: stopped while they import, and while `prepare` decodes."""
    for number, module in zip(cycle(SIGNALS), IMPORTED, strict=False):
        importing(work.place("import", CASES["pretrain idmm"]), module, number, found)
    return decoding(work.work, signal.SIGTERM)


def main() -> None:
    """Print the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--trials", type=int, default=50)
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    found = trials(options.trials, options.seed)
    with bench() as work:
        status, seconds, same = processes(work, found)
    told("runs asked to stop at chosen points, at random times and while importing", found.stops)
    told("promised exit status 75 of all", found.status)
    told("promised a sentence with `fastidmm resume` by all", found.sentence)
    told("promised 0 steps made and not kept", found.lost)
    told("promised at most 5 s and a step", f"{found.slowest:.2f} s")
    told("evaluations left unfinished, to be made good before the next step", found.left)
    told("promised 0 half-written checkpoints", found.unreadable)
    told("promised 0 metric lines and weights that differ by a bit", found.differing)
    told(f"promised an end at once when asked twice, of {found.twice}", found.at_once)
    told("promised 75 of prepare, and the same bytes after", f"{status}, {same}, {seconds:.2f} s")
    kept = found.status == found.sentence == found.stops and found.at_once == found.twice
    kept = kept and not (found.lost or found.unreadable or found.differing)
    raise SystemExit(not (kept and status == 75 and same))


if __name__ == "__main__":
    main()
