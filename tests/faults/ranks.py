"""Kill one of several ranks, or ask it to stop, at random times; go on with another number.

python tests/faults/ranks.py [--trials 50]
"""

import argparse
import os
import random
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forks import (
    CASES,
    PRETRAIN,
    RUN,
    Bench,
    Child,
    bench,
    command_of,
    start,
    steps_told,
    told,
    unreadable,
)
from ranked import as_rank
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fastidmm.record import Record

SOON = 60.0  # seconds in which all must end where one did
SIZES = (2, 3)
CASE = CASES["pretrain idmm"]
HELD: list[TCPStore] = []


def ranks(num: int, command: str, place: Path) -> list[Child]:
    """Begin a command as so many ranks of hosts without a launcher's eye on them.

    Each has a file for its words; what they leave for one another is held here, as a launcher does.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    HELD.append(store)

    def be(rank: int) -> None:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        said = os.open(f"said {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        as_rank(rank, num, store.port)

    # On a machine with GPUs, too, these are processes that share its cores.
    words = f"{command} --device cpu" if command.startswith("pretrain") else command
    return [start(words, place, partial(be, rank)) for rank in range(num)]


def said(place: Path) -> str:
    """All that the ranks said."""
    return "".join(path.read_text() for path in sorted(place.glob("said ?")))


def ended(children: list[Child]) -> list[int]:
    """Their exit statuses, once all have ended."""
    statuses = [child.status() for child in children]
    for child in children:
        child.gone(5)
    return statuses


def losses(folder: Path) -> list[float]:
    """Of every metric line."""
    return [line["loss"] for line in Record(folder).metrics()]


@dataclass(slots=True)
class Figures:
    """What the trials found."""

    kills: int = 0
    named: int = 0  # by its rank and the step, or before a run had begun
    stops: int = 0
    kept: int = 0  # status 75 on every rank, no step lost
    slowest: float = 0.0  # seconds from a kill to the end of all
    unreadable: int = 0
    apart: float = 0.0  # losses from those of one process, as a share of these


def trials(num: int, seed: int = 0) -> Figures:
    """So many runs, each with a rank killed or asked to stop, brought to their end by others."""
    chance, found = random.Random(seed), Figures()
    with bench() as work:
        work.truth("pretrain idmm")
        expected = losses(work.work / "truth pretrain idmm" / RUN)
        for number in range(num):
            trial(work, SIZES[number % 2], chance, found, kill=number % 4 < 2)
            run = work.work / "trial" / RUN
            apart = [abs(a - b) / b for a, b in zip(losses(run), expected, strict=True)]
            found.apart = max(found.apart, *apart)
    return found


def trial(work: Bench, size: int, chance: random.Random, found: Figures, *, kill: bool) -> None:
    """One run: one rank ends at a random time, another number of ranks goes on."""
    place = work.place("trial", CASE)
    children = ranks(size, PRETRAIN, place)
    _, seconds = work.truth("pretrain idmm")
    victim = chance.randrange(size)
    if not children[victim].wait(chance.uniform(0, seconds)):
        began = time.monotonic()
        os.kill(children[victim].pid, signal.SIGKILL if kill else signal.SIGTERM)
        statuses, folder = ended(children), place / RUN
        begun = (folder / "metrics.jsonl").exists()
        if kill and statuses[victim] == -signal.SIGKILL:
            found.kills += 1
            found.slowest = max(found.slowest, time.monotonic() - began)
            named = f"rank {victim} ended" in said(place) and "resume" in said(place)
            found.named += named or not begun
        elif not kill and any(statuses):
            found.stops += 1
            lost = begun and steps_told(folder) > Record(folder).steps
            found.kept += set(statuses) == {75} and not lost
        found.unreadable += unreadable(folder)
    else:
        ended(children)
    going_on = ranks(size ^ 1, command_of(CASE, place), place)
    if any(ended(going_on)):
        raise AssertionError(said(place))


def main() -> None:
    """Print the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--trials", type=int, default=50)
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    found = trials(options.trials, options.seed)
    told("ranks killed", found.kills)
    told(f"promised an end of all within {SOON:.0f} s", f"{found.slowest:.1f} s")
    told("promised the rank and the step named by all but those that had not begun", found.named)
    told("ranks asked to stop", found.stops)
    told("promised 75 on every rank and no step lost", found.kept)
    told("promised 0 unreadable checkpoints", found.unreadable)
    told("promised losses of one process, by other ranks to the end", f"{found.apart:.1e} apart")
    raise SystemExit(bool(found.kept != found.stops or found.unreadable))


if __name__ == "__main__":
    main()
