"""Images per second that every loader delivers, what they cost, and how long training waits.

    fastidmm bench loader [--dataset NAME | --from PHOTOGRAPHS] [--loader NAME ...] [--quick]

All loaders read the same prepared files, which the system has in memory by then, and make the
recipe's views of the same rows. Each lives in a process of its own, `loader_child.py`, so that
memory and the cold start (from starting Python to the first batch) are its own. They take turns,
A B C A B C; a process whose turn it is not has no iterator open, and sleeps.

What was made ahead is not counted as free. In a turn the consumer takes batch after batch and does
nothing with them, so that queues are drained from the beginning: batches are left out until every
worker has given one, and then counted in lots of one per core, from one arrival to another.
As much is in the making at the end as was at the beginning. Core-seconds are the CPU time of the
whole process tree in that window, workers and threads included, and so is memory; a GPU is waited
for at both ends.

Stall is 1 - (time of a step on one batch, again and again) / (time of a step on the loader's
batches), in the same process; the former before and after the latter, so that a machine that slows
down does so for both. Loaders work as they do by default; on a CPU torch's operations have one
thread.

`stock-dali` is a pipeline all of DALI's own (`stock_dali.py`), which mixes nothing: no training.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastidmm.bench.figures import Row, Rows, measured, ratio, result
from fastidmm.bench.loader_child import STOCK
from fastidmm.bench.made import at_home, photographs_in, workplace
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError, did_you_mean
from fastidmm.machine import name_of
from fastidmm.preparing.prepare import prepare
from fastidmm.registry import LOADERS, find
from fastidmm.store import Store, folder_of, open_store

WIDTH, HEIGHT = 500, 375
PATIENCE = 180.0  # seconds for an answer: the first may compile
GRACE = 10.0  # seconds for a process to end by itself
MADE_UP = "made-up"


class Arm(NamedTuple):
    """A row: a loader and its table `[loader]`, and what training by it has in `[run]`."""

    name: str
    loader: str
    options: tuple[tuple[str, Any], ...] = ()
    run: tuple[tuple[str, Any], ...] = ()


class Plan(NamedTuple):
    """How much is measured."""

    rounds: int  # turns of each loader alone
    train_rounds: int  # turns of training
    seconds: float  # of a turn, at least

    @classmethod
    def of(cls, device: torch.device, *, quick: bool) -> "Plan":
        """Five turns, or what is worth having in half a minute a loader."""
        if not quick:
            return cls(5, 3, 3.0)
        # On a CPU a step takes seconds, and loaders hardly keep it waiting.
        return cls(3, 1 if device.type == "cuda" else 0, 1.0)


def arms(names: Sequence[str] | None = None) -> list[Arm]:
    """The rows of these loaders, or of all there are."""
    known = [*sorted(LOADERS, key=lambda name: name != "resident"), STOCK]  # ours first
    for name in names or ():
        if name not in known:
            raise UsageError(f"unknown loader {name!r}: {did_you_mean(name, known)}")
    return [Arm(name, name) for name in names or known]


def measure(
    device: torch.device,
    *,
    quick: bool = False,
    chosen: Sequence[Arm] | None = None,
    dataset: str | None = None,
    photographs: Path | None = None,
    batch_size: int | None = None,
    backbone: str | None = None,
    resolution: int = 112,
) -> dict[str, Any]:
    """Measure loaders over a prepared dataset, a folder of photographs, or made-up JPEGs."""
    chosen, plan = chosen or arms(), Plan.of(device, quick=quick)
    gpu = device.type == "cuda"
    size = batch_size or (256 if gpu else 16)
    with ExitStack() as stack:
        work = stack.enter_context(workplace())
        about = f"dataset {dataset}"
        if dataset is None:
            stack.enter_context(at_home(work / "home"))
            beton = any(arm.loader == "ffcv" for arm in chosen)
            dataset, about = _prepared(work, photographs, 4 * size, beton=beton)
        store = open_store(folder_of(dataset), "train")
        settings = {
            "dataset": dataset, "batch_size": size, "resolution": resolution,
            "device": str(device), "backbone": backbone or ("deit_tiny" if gpu else "vit_micro"),
            "seconds": plan.seconds,
        }  # fmt: skip
        rows, turns = _turns(chosen, plan, settings, store, work)
    return result(
        "loader",
        f"{len(store):,} images, {about}; batches of {size}, {resolution} px, {name_of(device)}",
        {"loaders": rows},
        settings=settings | {"rounds": plan.rounds, "train_rounds": plan.train_rounds},
        notes=_notes(turns),
        dataset={"name": dataset, "images": len(store), "fingerprint": store.fingerprint},
    )


def gain(turns: dict[str, list[Row]]) -> Row | None:
    """How many times as much `resident` delivers per core-second as `torch`, turn by turn."""
    names = ("torch", "resident")
    costs = [[turn["core_seconds"] for turn in turns.get(name, ())] for name in names]
    if not all(costs) or not all(c for cost in costs for c in cost):
        return None
    return ratio(*costs)


def _notes(turns: dict[str, list[Row]]) -> list[str]:
    found = gain(turns)
    if found is None:
        return []
    middle, low, high = (f"{found[key]:.1f}" for key in ("median", "low", "high"))
    return [f"per core-second, resident / torch: {middle} ({low} to {high})"]


def _prepared(work: Path, photographs: Path | None, num: int, *, beton: bool) -> tuple[str, str]:
    """The name of a store made for this, and what is in it."""
    about = f"photographs in {photographs}"
    if photographs is None:
        photographs = photographs_in(work / "photographs", num, width=WIDTH, height=HEIGHT)
        about = f"made-up JPEGs of {WIDTH} x {HEIGHT} px"
    source = Folder().open(from_=photographs, seed=0)
    prepare(source, MADE_UP, quiet=True)
    with suppress(UsageError, DataError):  # the row of FFCV says what is missing
        prepare(source, MADE_UP, quiet=True, beton=beton)
    return MADE_UP, about


def _turns(
    chosen: Sequence[Arm], plan: Plan, settings: dict[str, Any], store: Store, work: Path
) -> tuple[Rows, dict[str, list[Row]]]:
    """The rows, and the turns of the loaders that could be measured."""
    rows: Rows = {}
    cold: dict[str, Row] = {}
    turns: dict[str, list[Row]] = {}
    trained: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for arm in chosen:
            rows[arm.name] = {"status": "ok"}
            try:
                if problem := missing(arm.loader, store):
                    raise Unmeasured(f"missing: {problem}")
                place = work / f"child-{len(rows)}"
                child = stack.enter_context(started(arm, settings, place))
                cold[arm.name] = {"cold_seconds": child.first()}
                children[arm.name] = child
            except Unmeasured as problem:
                rows[arm.name]["status"] = str(problem)
        orders = [("load", turns)] * plan.rounds + [("train", trained)] * plan.train_rounds
        for order, kept in orders:
            for arm in chosen:
                alone = order == "train" and arm.loader == STOCK
                if alone or rows[arm.name]["status"] != "ok":
                    continue
                try:
                    kept.setdefault(arm.name, []).append(children[arm.name].turn(order))
                except Unmeasured as problem:
                    rows[arm.name]["status"] = str(problem)
    for name, row in rows.items():
        if row["status"] == "ok":
            row |= _joined(turns.get(name, [])) | _joined(trained.get(name, [])) | cold[name]
    good = {name: found for name, found in turns.items() if rows[name]["status"] == "ok"}
    return rows, good


def _joined(turns: list[Row]) -> Row:
    """Every figure over its turns."""
    keys = turns[0] if turns else ()
    columns = {key: [turn[key] for turn in turns] for key in keys}
    return {key: None if None in found else measured(found) for key, found in columns.items()}


def missing(loader: str, store: Store) -> str | None:
    """Why a loader cannot be measured here, with the remedy; None where it can."""
    kind = find("loader", "dali" if loader == STOCK else loader)
    problem: str | None = kind.unusable() or kind.unfit(store)
    return problem


class Unmeasured(Exception):
    """Why a row has no figures."""


class Child:
    """A loader's process, as seen from here."""

    def __init__(self, process: subprocess.Popen[str], began: float, stderr: Path) -> None:
        self.process, self.began, self.stderr = process, began, stderr

    def first(self) -> float:
        """Waits for the first batch; seconds since the process was started."""
        self._answer()
        return time.monotonic() - self.began

    def turn(self, order: str) -> Row:
        """Has a turn measured."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its end is found out below
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            raise Unmeasured(f"failed: no answer in {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            said = self.stderr.read_text(errors="replace").split("\n")
            last = next((text for text in reversed(said) if text.strip()), "it said nothing")
            raise Unmeasured(f"failed: ended with status {self.process.wait()}: {last[:200]}")
        answer: Row = json.loads(line)
        if "failed" in answer:
            raise Unmeasured(f"failed: {answer['failed']}"[:300])
        return answer


@contextmanager
def started(arm: Arm, settings: dict[str, Any], place: Path) -> Iterator[Child]:
    """A process with a loader in it, and a folder of its own; ended with all below it."""
    place.mkdir()
    own = {"loader": arm.loader, "options": dict(arm.options), "run": dict(arm.run)}
    told = own | {"work": str(place)} | settings
    alone = {"OMP_NUM_THREADS": "1"} if settings["device"] == "cpu" else {}
    with (place / "stderr").open("w") as stderr:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "fastidmm.bench.loader_child", json.dumps(told)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env={**os.environ, **alone}, start_new_session=True,
        )  # fmt: skip
    try:
        yield Child(process, began, place / "stderr")
        process.communicate(timeout=GRACE)  # no more orders: it ends
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Workers of a process that hangs, too: they are of its session.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
