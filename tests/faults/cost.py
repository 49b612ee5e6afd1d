"""What checkpoints cost a run of the paper's size: DeiT-Tiny, 2,040 photographs, 800 epochs.

    python tests/faults/cost.py

Steps are timed on this CPU, over few photographs, and scaled by their number.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from forks import bench, told

from fastidmm import checkpoint, stages
from fastidmm.recipe import Recipe
from fastidmm.record import Record

IMAGES, EPOCHS = 2040, 800


@dataclass(slots=True)
class Figures:
    """Seconds, and epochs from one checkpoint to the next."""

    save: float
    image: float
    epochs: int

    @property
    def share(self) -> float:
        """Of the run's time that goes to checkpoints."""
        return self.save / (self.save + self.image * self.epochs * IMAGES)

    @property
    def limit(self) -> float:
        """Images per second above which the share would pass 1 %."""
        return self.epochs * IMAGES / (99 * self.save)


def measured() -> Figures:
    """Train for a few steps; what a checkpoint and an image took."""
    saves: list[float] = []
    real = checkpoint.save

    def timed(*args: Any) -> Path:
        began = time.perf_counter()
        path = real(*args)
        saves.append(time.perf_counter() - began)
        return path

    run = {
        "dataset": "toy", "batch_size": 8, "epochs": 1, "num_images": 32, "knn_every": 9,
        "checkpoint_every": 1, "log_every": 1,
    }  # fmt: skip
    cadence = Recipe.of({"run": {"dataset": "toy", "epochs": EPOCHS}}).run.checkpoint_every
    with bench() as work, patch.object(checkpoint, "save", timed):
        found = stages.pretrain(Recipe.of({"run": run}), str(work.work / "run"))
        lines = Record(Path(found["run"])).metrics()
    rates = [line["images_per_second"] for line in lines]
    return Figures(median(saves), 1 / median(rates), cadence)


def main() -> None:
    """Print the figures."""
    found = measured()
    told("a checkpoint of DeiT-Tiny and its moments", f"{found.save:.3f} s")
    told("epochs from one to the next, of 800", found.epochs)
    told("promised at most 1 % of a run's time", f"{100 * found.share:.5f} %")
    told("which holds up to so many images per second", f"{found.limit:,.0f}")


if __name__ == "__main__":
    main()
