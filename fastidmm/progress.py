"""How fast and how far a run is: one live line on a terminal, one line a minute elsewhere."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastidmm.batch import Batch
from fastidmm.watch import Watch

SHOWN = (
    "loss", "instance_top1", "contrast_top1", "teacher_entropy", "train_top1", "knn_top1",
    "holdout_top1", "test_top1",
)  # fmt: skip
SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Rate, data-wait and quality of a run, from the metric lines it writes."""

    def __init__(self, name: str, watch: Watch, *, epochs: int, steps: int, done: int) -> None:
        self.name, self.epochs, self.steps, self.first = name, epochs, steps, done
        self.watch = watch
        self.began = time.perf_counter()
        self.shown = self.began
        self.live = sys.stderr.isatty()
        self.kept: dict[str, Any] = {}

    def show(self, line: dict[str, Any]) -> None:
        """Take in a metric line, and show it where it is time to; warn where nothing is learnt."""
        for sentence in self.watch.see(line):
            say(sentence)
        self.kept.update({key: line[key] for key in SHOWN if line.get(key) is not None})
        now = time.perf_counter()
        last = line["step"] == self.steps
        if self.live:
            sys.stderr.write("\r\x1b[K" + self._text(line, now) + ("\n" if last else ""))
            sys.stderr.flush()
        elif last or now - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            print(self._text(line, now), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave a live line standing."""
        if self.live and self.kept:
            sys.stderr.write("\n")

    def _text(self, line: dict[str, Any], now: float) -> str:
        made = line["step"] - self.first
        left = (self.steps - line["step"]) * (now - self.began) / max(made, 1)
        parts = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in self.kept.items()]
        return "  ".join(
            [
                f"{self.name}: epoch {line['epoch']}/{self.epochs}",
                f"step {line['step']}/{self.steps}",
                *parts,
                f"{line['images_per_second']:.0f} images/s",
                f"data-wait {100 * line['data_wait']:.0f} %",
                f"{_clock(left)} left",
            ]
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Clock:
    """Images per second, and the share of time spent waiting for data, since last asked.

    On a GPU the wait is the host's, to launch the views; the device's stall is the benchmark's.
    """

    def __init__(self) -> None:
        self.images, self.waited = 0, 0.0
        self.since = self.lapped = time.perf_counter()
        self.apart: defaultdict[str, list[float]] = defaultdict(list)  # seconds of what is no step

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, its waiting time noted."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def rates(self) -> dict[str, float]:
        """Both figures as a metric line holds them."""
        spent = max(time.perf_counter() - self.since, 1e-9)
        rates = {
            "images_per_second": round(self.images / spent, 2),
            "data_wait": round(self.waited / spent, 4),
        }
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()
        return rates

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Keep the time of a look or a checkpoint out of the rates, and by itself."""
        began = time.perf_counter()
        yield
        self.apart[what].append(time.perf_counter() - began)
        self.since += self.apart[what][-1]

    @property
    def seconds_apart(self) -> float:
        """Of all that was no step."""
        return sum(map(sum, self.apart.values()))

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        spent, self.lapped = now - self.lapped, now
        return spent


def say(message: str) -> None:
    """A line for the person at the terminal; answers go to stdout, this does not."""
    # On a terminal the line may hold the live progress: it is redrawn below.
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}{message}", file=sys.stderr, flush=True)
