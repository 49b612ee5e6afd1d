"""Images per second that `prepare` makes a store of, against the number of cores.

    fastidmm bench prepare [--from FOLDER] [--json]

Each measurement is a whole `prepare` in a fresh folder: list, decode, hash, write, sync, check.
The process is held to the cores counted, where the system can do that. Repeats are interleaved, so
that a machine that slows down does so for all.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from fastidmm.datasets.folder import Folder
from fastidmm.errors import UsageError
from fastidmm.preparing.decode import num_cores
from fastidmm.preparing.prepare import prepare

HEIGHT, WIDTH, QUALITY = 500, 667, 90


def measure(
    folder: Path | None, *, num_images: int, repeats: int, cores: Sequence[int] | None = None
) -> dict[str, Any]:
    """Time `prepare` of `folder`, or of made-up photographs, on each number of cores.

    Without `cores`: 1, 2, 4 and so on, and all. `rates` are images per second, as measured.
    """
    counts = sorted(set(cores)) if cores else _doubling(num_cores())
    if counts[0] < 1 or counts[-1] > num_cores():
        raise UsageError(f"--cores {counts}: this process may use 1 to {num_cores()}.")
    with tempfile.TemporaryDirectory(prefix="fastidmm-bench-") as made:
        work = Path(made)
        photographs = folder or photographs_in(work / "photographs", num_images)
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(repeats):
            for count in counts:
                rates[count].append(_rate(photographs, work / "home", count))
    return {
        "from": str(folder) if folder else f"{num_images} made-up JPEGs of {WIDTH} x {HEIGHT} px",
        "machine": platform.processor() or platform.machine(),
        "cores": num_cores(),
        "pillow": pillow_version,
        "results": [
            {"cores": count, "rates": [round(rate, 1) for rate in measured]}
            for count, measured in rates.items()
        ],
    }


def text(told: dict[str, Any]) -> str:
    """A measurement as a table: median, least and most, and the gain over the fewest cores."""
    lines = [f"prepare, {told['from']}", "cores  images/s  (least to most)  gain"]
    base = median(told["results"][0]["rates"])
    for result in told["results"]:
        rates = result["rates"]
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        middle = median(rates)
        lines.append(f"{result['cores']:5}  {middle:8,.0f}  {spread:15}  {middle / base:.2f}")
    return "\n".join(lines)


def photographs_in(folder: Path, num: int) -> Path:
    """Write made-up JPEGs of a photograph's size: smooth shapes under fine noise."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(num):
        coarse = chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        noise = chance.normal(0, 6, (HEIGHT, WIDTH, 1))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=QUALITY)
    return folder


def _doubling(most: int) -> list[int]:
    """1, 2, 4 and so on below `most`, and `most`."""
    return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})


def _rate(folder: Path, home: Path, count: int) -> float:
    """Images per second of one `prepare` on so many cores."""
    shutil.rmtree(home, ignore_errors=True)
    with _at_home(home), _held_to(count):
        began = time.perf_counter()
        source = Folder().open(from_=folder, seed=0)
        summary = prepare(source, "bench", workers=count, quiet=True)
        return (summary.num_train + summary.num_test) / (time.perf_counter() - began)


@contextmanager
def _at_home(home: Path) -> Iterator[None]:
    """Stores go to a folder of the measurement's own."""
    before = os.environ.get("FASTIDMM_HOME")
    os.environ["FASTIDMM_HOME"] = str(home)
    try:
        yield
    finally:
        del os.environ["FASTIDMM_HOME"]
        if before is not None:
            os.environ["FASTIDMM_HOME"] = before


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
