"""Images per second that `prepare` makes a store of, against the number of cores.

    fastidmm bench prepare [--from FOLDER] [--json FILE]

Each measurement is a whole `prepare` in a fresh folder: list, decode, hash, write, sync, check.
The process is held to the cores counted, where the system can do that. Repeats are interleaved, so
that a machine that slows down does so for all.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from fastidmm.bench.figures import Rows, measured, result
from fastidmm.bench.made import at_home, photographs_in, workplace
from fastidmm.datasets.folder import Folder
from fastidmm.errors import UsageError
from fastidmm.facts import num_cores
from fastidmm.preparing.prepare import prepare


def measure(
    folder: Path | None = None,
    *,
    quick: bool = False,
    num_images: int | None = None,
    repeats: int | None = None,
    cores: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Time `prepare` of `folder`, or of made-up photographs, on each number of cores.

    Without `cores`: 1, 2, 4 and so on, and all. `gain` is over the fewest.
    """
    num_images, repeats = num_images or (100 if quick else 400), repeats or (3 if quick else 5)
    counts = sorted(set(cores)) if cores else _doubling(num_cores())
    if counts[0] < 1 or counts[-1] > num_cores():
        raise UsageError(f"--cores {counts}: this process may use 1 to {num_cores()}.")
    with workplace() as work:
        photographs = folder or photographs_in(work / "photographs", num_images)
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(repeats):
            for count in counts:
                rates[count].append(_rate(photographs, work / "home", count))
    base = median(rates[counts[0]])
    rows: Rows = {
        f"{count} core{'s' if count > 1 else ''}": {
            "status": "ok",
            "images_per_second": measured(found),
            "gain": median(found) / base,
        }
        for count, found in rates.items()
    }
    settings = {"images": None if folder else num_images, "repeats": repeats, "cores": counts}
    about = str(folder) if folder else f"{num_images} made-up JPEGs of 667 x 500 px"
    return result("prepare", about, {"cores": rows}, settings=settings)


def _doubling(most: int) -> list[int]:
    """1, 2, 4 and so on below `most`, and `most`."""
    return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})


def _rate(folder: Path, home: Path, count: int) -> float:
    """Images per second of one `prepare` on so many cores."""
    shutil.rmtree(home, ignore_errors=True)
    with at_home(home), _held_to(count):
        began = time.perf_counter()
        source = Folder().open(from_=folder, seed=0)
        summary = prepare(source, "bench", workers=count, quiet=True)
        return (summary.num_train + summary.num_test) / (time.perf_counter() - began)


@contextmanager
def _held_to(count: int) -> Iterator[None]:
    """Run on so many cores; threads begun inside inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
