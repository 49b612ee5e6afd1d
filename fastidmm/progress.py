"""How fast and how far a run is: a live block on a terminal, one line a minute elsewhere."""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import quantiles
from typing import IO, Any, Self, cast

from fastidmm.batch import Batch
from fastidmm.terminal import Remarks, show
from fastidmm.terminal import line as one_line
from fastidmm.watch import Watch

SHOWN = (
    "loss", "instance_top1", "contrast_top1", "teacher_entropy", "train_top1", "knn_top1",
    "holdout_top1", "test_top1",
)  # fmt: skip
LABEL_FREE = ("retrieval_top1", "rankme")  # shown as well where there is no kNN
SECONDS_BETWEEN = {"lines": 60.0, "blocks": 0.1}


class Progress:
    """Rate, data-wait, GPU memory and quality of a run, from the metric lines it writes.

    A context: what is live on a terminal is left standing at its end.
    """

    def __init__(self, name: str, watch: Watch, *, epochs: int, steps: int, done: int) -> None:
        self.name, self.epochs, self.steps = name, epochs, steps
        self.watch = watch
        self.pace = Pace(steps, done)
        self.shown = time.perf_counter()
        self.kept: dict[str, Any] = {}
        self.live = Block() if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live:
            self.live.end()

    def show(self, line: dict[str, Any]) -> None:
        """Take in a metric line, and show it where it is time to; warn where nothing is learnt."""
        for sentence in self.watch.see(line):
            say(sentence)
        self.kept.update({key: value for key, value in line.items() if value is not None})
        now = time.perf_counter()
        self.pace.passed(line["step"], now)
        where = (
            f"{self.name}: epoch {line['epoch']}/{self.epochs}",
            f"step {line['step']}/{self.steps}",
            f"{self.pace} left",
        )
        figures = [
            *spoken(self.kept),
            f"{line['images_per_second']:.0f} images/s",
            f"data-wait {100 * line['data_wait']:.0f} %",
            *_gpu_memory(),
        ]
        between = SECONDS_BETWEEN["blocks" if self.live else "lines"]
        if line["step"] < self.steps and now - self.shown < between:
            return
        self.shown = now
        if self.live:
            self.live.show(
                line["step"] / self.steps, one_line("  ".join(where)), "  ".join(figures)
            )
        else:
            show(one_line("  ".join([*where, *figures])), sys.stderr)


class Block:
    """A bar and two lines of text at the end of a terminal, drawn anew when they are shown."""

    def __init__(self) -> None:
        from rich.console import Console  # not before the end of --help
        from rich.live import Live

        remarks = cast(IO[str], Remarks())
        # What is printed meanwhile appears above.
        self.live = Live(console=Console(file=remarks), auto_refresh=False, redirect_stdout=False)
        self.begun = False

    def show(self, done: float, where: str, figures: str) -> None:
        """`done`: the share of all steps."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.begun:
            self.live.start()
            self.live.console.show_cursor()  # a killed run would leave none
            self.begun = True
        rows = Table.grid()
        for row in (ProgressBar(total=1.0, completed=done), Text(where), Text(figures)):
            rows.add_row(row)
        self.live.update(rows, refresh=True)

    def end(self) -> None:
        """Leave it as it was shown last."""
        self.live.stop()


class Pace:
    """The time that is left, by the metric lines so far."""

    def __init__(self, steps: int, done: int) -> None:
        """`steps` in all, of which some were done before."""
        self.steps = steps
        self.began = done, time.perf_counter()
        self.marks: deque[tuple[int, float]] = deque(maxlen=256)  # steps made, when

    def passed(self, step: int, now: float) -> None:
        """So many steps are made."""
        self.marks.append((step, now))

    @property
    def seconds(self) -> tuple[float, float, float]:
        """By the mean, the faster quarter and the slower quarter of the steps between two lines."""
        # The time to the first line is compiling and warming up, where there are others.
        marks = self.marks if len(self.marks) > 1 else [self.began, *self.marks]
        left = self.steps - marks[-1][0]
        each = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks) if b[0] > a[0]] or [0.0]
        mean = (marks[-1][1] - marks[0][1]) / max(marks[-1][0] - marks[0][0], 1)
        low, _, high = quantiles(each, method="inclusive") if len(each) > 1 else each * 3
        return left * mean, left * min(low, mean), left * max(high, mean)

    def __str__(self) -> str:
        mean, low, high = map(_clock, self.seconds)
        return f"{mean} ({low} to {high})" if low != high else mean


def spoken(found: dict[str, Any]) -> list[str]:
    """The numbers to show of a metric line, in words: `loss 3.210`."""
    keys = SHOWN if "knn_top1" in found else (*SHOWN, *LABEL_FREE)
    shown = {key: found[key] for key in keys if isinstance(found.get(key), float)}
    return [f"{key.replace('_', ' ')} {value:.3f}" for key, value in shown.items()]


def _gpu_memory() -> list[str]:
    """The most that was reserved of the GPU in use; nothing without one."""
    import torch

    if not torch.cuda.is_initialized():
        return []
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return [f"GPU {torch.cuda.max_memory_reserved() / 1e9:.1f} of {whole / 1e9:.0f} GB"]


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
    show(one_line(message), sys.stderr)
