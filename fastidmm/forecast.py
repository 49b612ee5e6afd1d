"""What a stage will take: from the costs of single events to its seconds, and as it trains."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastidmm.preparing.files import write_whole
from fastidmm.progress import Clock, say

FORECAST = "forecast.json"
WARM_UP = 5  # steps whose time says little: memory is found, kernels are compiled
STEPS, INTERVALS = 20, 3  # to have seen beyond them, and between so many metric lines
BACKWARD = 3  # a training step takes a crop three times as long as a look at it, roughly


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of whatever happens in a stage."""

    full: float  # a step of a whole batch
    tail: float  # the shorter one that ends an epoch
    knn: float = 0.0
    score: float = 0.0
    checkpoint: float = 0.0


@dataclass(frozen=True, slots=True)
class Events:
    """How often each happens."""

    full: int
    tail: int
    knn: int
    score: int
    checkpoint: int

    def seconds(self, costs: Costs) -> float:
        """What all of them take."""
        found: float = sum(num * getattr(costs, name) for name, num in asdict(self).items())
        return found


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a stage. `knn`, `score`, `checkpoint`: steps between two; 0: never."""

    num_images: int
    batch_size: int
    epochs: int
    knn: int
    score: int
    checkpoint: int

    @property
    def batch(self) -> int:
        """Images of a full step: all of them, where they do not fill a batch."""
        return min(self.batch_size, self.num_images)

    @property
    def tail(self) -> int:
        """Images of the shorter step that ends an epoch; 0: there is none."""
        return self.num_images % self.batch

    @property
    def steps_per_epoch(self) -> int:
        """Full ones and the shorter one."""
        return -(-self.num_images // self.batch)

    @property
    def last(self) -> int:
        """The last step's place in its epoch."""
        return self.steps_per_epoch - 1

    @property
    def steps(self) -> int:
        """Of the whole stage."""
        return self.epochs * self.steps_per_epoch

    def images(self, step: int) -> int:
        """Images learnt from after so many steps."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.num_images + rest * self.batch

    def after(self, step: int) -> Events:
        """What is still to come after so many steps; a checkpoint before the first one, too."""
        left = self.steps - step
        tails = self.epochs - step // self.steps_per_epoch if self.tail else 0
        knn, score, checkpoint = (
            self._due(step, every) for every in (self.knn, self.score, self.checkpoint)
        )
        return Events(left - tails, tails, knn, score, checkpoint + (step == 0))

    def _due(self, step: int, every: int) -> int:
        """Times to come of what is due every so many steps, and after the last."""
        if not every or step == self.steps:
            return 0
        return self.steps // every - step // every + bool(self.steps % every)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a stage will take; `low` and `high`: were all steps as its fastest or slowest tried."""

    stage: str
    steps: int
    seconds: float
    low: float
    high: float
    memory: int  # bytes at most: the GPU's, or of a CPU those resident
    watts: float | None = None  # None: not measured
    micro_batches: int = 1
    short: bool = False  # of memory: that many micro-batches were found by trying

    def cost(self, price: float) -> float:
        """At a price per hour."""
        return self.seconds / 3600 * price

    @property
    def energy(self) -> float | None:
        """Watt-hours."""
        return None if self.watts is None else self.watts * self.seconds / 3600

    def as_dict(self, price: float | None) -> dict[str, Any]:
        """For JSON; what was not measured or not asked for is null."""
        return {
            "stage": self.stage,
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
            "interval": [round(self.low, 2), round(self.high, 2)],
            "memory_bytes": self.memory,
            "energy_wh": None if self.energy is None else round(self.energy, 3),
            "cost": None if price is None else round(self.cost(price), 4),
            "micro_batches": self.micro_batches,
        }


def total(found: Sequence[Forecast]) -> Forecast:
    """All stages in a row."""
    seconds = sum(each.seconds for each in found)
    energies = [each.energy for each in found]
    known = [energy for energy in energies if energy is not None]
    return Forecast(
        "total",
        sum(each.steps for each in found),
        seconds,
        sum(each.low for each in found),
        sum(each.high for each in found),
        max(each.memory for each in found),
        sum(known) * 3600 / seconds if len(known) == len(found) else None,
        max(each.micro_batches for each in found),
    )


def table(found: Sequence[Forecast], price: float | None) -> str:
    """Stages and their total, as a person reads them."""
    rows = [("", "steps", "time", "between", "memory", "energy", "cost")]
    for each in (*found, total(found)):
        energy, between = each.energy, (each.low, each.high)
        rows.append((
            each.stage,
            f"{each.steps:,}" if each.steps else "",
            spell(each.seconds),
            " and ".join(map(spell, between)) if each.low < each.high else "",
            f"{each.memory / 1e9:.2f} GB",
            "not measured" if energy is None else f"{energy:,.1f} Wh",
            "" if price is None else f"{each.cost(price):,.2f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def spell(seconds: float) -> str:
    """A time in the unit a person would use."""
    if seconds < 119.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{seconds / 3600:.1f} h"


class Outlook:
    """A stage's forecast of itself, from the times at which its first metric lines arrive."""

    def __init__(self, course: Course, crops: int) -> None:
        """`crops`: views of an image in a step."""
        self.course, self.crops = course, crops
        self._first = -1
        self._marks: list[tuple[int, float]] = []  # steps made, seconds they took
        self._told: tuple[float, float] | None = None  # forecast seconds, and when
        self.told: dict[str, float] = {}  # what a finished stage says of it

    def restart(self, step: int) -> None:
        """The stage begins, or goes on, from this step: what was seen before counts no longer."""
        self._first, self._marks, self._told = step, [], None

    def arrived(self, lines: Iterable[dict[str, Any]], clock: Clock) -> None:
        """Take in metric lines as they arrive; say the forecast once there is one."""
        if self._told:
            return
        for line in lines:
            if line["step"] >= self._first + WARM_UP:
                self._marks.append((line["step"], time.perf_counter() - clock.seconds_apart))
        if len(self._marks) <= INTERVALS or self._marks[-1][0] - self._marks[0][0] < STEPS:
            return
        step = self._marks[-1][0]
        left = self.course.steps - step
        if left:
            seconds = self.seconds_after(step, self._marks, clock.apart)
            self._told = seconds, time.perf_counter()
            say(f"forecast: {spell(seconds)} for the {left:,} steps left")

    def seconds_after(
        self, step: int, marks: Sequence[tuple[int, float]], apart: dict[str, list[float]]
    ) -> float:
        """What the steps and looks left take, from steps' marks and from looks made so far."""
        images = self.course.images
        rates = [(b[1] - a[1]) / (images(b[0]) - images(a[0])) for a, b in pairwise(marks)]
        image = middle_mean(rates)
        look = image * self.course.num_images / (BACKWARD * self.crops)
        guesses = {"knn": look, "score": look, "checkpoint": 0.0}
        told = {name: apart.get(name) or [guess] for name, guess in guesses.items()}
        costs = {name: sum(seconds) / len(seconds) for name, seconds in told.items()}
        events = self.course.after(step)
        seconds = events.seconds(Costs(full=0.0, tail=0.0, **costs))
        return seconds + image * (images(self.course.steps) - images(step))

    def end(self) -> None:
        """The stage is done: what came of the forecast."""
        if self._told:
            seconds, when = self._told
            took = time.perf_counter() - when
            say(f"forecast {spell(seconds)}, took {spell(took)}")
            self.told = {"forecast_seconds": round(seconds, 1), "forecast_took": round(took, 1)}


def keep(folder: Path, told: dict[str, float]) -> None:
    """Leave in a stage's folder what it had forecast, and what came of it."""
    write_whole(folder / FORECAST, json.dumps(told))


def kept(folder: Path) -> dict[str, float]:
    """The same again; empty where nothing was forecast, or it cannot be read."""
    try:
        found = json.loads((folder / FORECAST).read_text())
        return {key: float(found[key]) for key in ("forecast_seconds", "forecast_took")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def middle_mean(values: Sequence[float]) -> float:
    """The mean without a quarter of the values at either end: a graph's capture is none of it."""
    found = sorted(values)
    quarter = len(found) // 4
    kept = found[quarter : len(found) - quarter]
    return sum(kept) / len(kept)
