"""One loader in a process of its own: it makes a first batch, then measures a turn when asked.

    python -m fastidmm.bench.loader_child SETTINGS

Settings and orders are JSON, as are the answers, a line each; whatever libraries print to stdout
goes to stderr. `loader.py` starts it and says why the numbers are fair.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastidmm.assemble import Parts
from fastidmm.batch import Batch
from fastidmm.bench.figures import stall
from fastidmm.bench.made import views_of_idmm
from fastidmm.bench.processes import cpu_seconds, memory
from fastidmm.bench.training import assembled
from fastidmm.capture import WARM_UP, Brake, Captured, stepped
from fastidmm.chance import Counters
from fastidmm.errors import FastidmmError
from fastidmm.facts import num_cores
from fastidmm.loaders.files import Files
from fastidmm.machine import dtype_of, set_up, synchronize
from fastidmm.plan import num_steps
from fastidmm.progress import Clock
from fastidmm.registry import find
from fastidmm.step import Stepped, step
from fastidmm.store import folder_of, open_store

STOCK = "stock-dali"


class Turn(NamedTuple):
    """What a window of batches took."""

    seconds: float
    core_seconds: float | None
    images: int
    crops: int


class Child:
    """A loader, and later the training step that it feeds."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = set_up(settings["device"], exact=False)
        self.store = open_store(folder_of(settings["dataset"]), "train")
        self.held = 0  # bytes of the GPU, when it did something last: others use it, too
        self.enter()
        self.open = self._stock() if settings["loader"] == STOCK else self._planned()
        self.parts: Parts | None = None

    def enter(self) -> None:
        """What the GPU has free now is what others leave."""
        self.entered = self._free()

    def leave(self) -> None:
        """What it has less by now is this process's."""
        self.held += self.entered - self._free()

    def first(self) -> dict[str, Any]:
        """Makes one batch."""
        batches = self.open()
        next(batches)
        synchronize(self.device)
        _close(batches)
        return {"images": len(self.store), "fingerprint": self.store.fingerprint}

    def load(self) -> dict[str, Any]:
        """A turn of the loader alone."""
        began = time.perf_counter()
        batches = self.open()
        next(batches)
        synchronize(self.device)
        warm = time.perf_counter() - began
        for _ in range(self._unsteady()):
            next(batches)
        turn = self._window(batches, num_cores())
        held = memory(os.getpid())
        used = self.held + self.entered - self._free()
        _close(batches)
        cores = turn.core_seconds
        return {
            "images_per_second": turn.images / turn.seconds,
            "crops_per_second": turn.crops / turn.seconds,
            "core_seconds": None if cores is None else 1000 * cores / turn.images,
            "warm_seconds": warm,
            "memory_mb": held and held[0] / 1e6,
            "mapped_mb": held and held[1] / 1e6,
            "gpu_mb": used / 1e6 if self.device.type == "cuda" else None,
        }

    def train(self) -> dict[str, Any]:
        """A turn of the training step: on the loader's batches, before and after it on one."""
        parts = self.parts or self._assembled()
        batches = parts.loader.batches(0)
        still = next(batches)
        batches.close()
        oracle = self._on_one(parts, still)
        for _ in range(WARM_UP):
            next(oracle)
        before = self._window(oracle, 1)
        stepping = stepped(parts, Clock())
        for _ in range(self._unsteady()):
            next(stepping)
        actual = self._window(stepping, num_cores())
        stepping.close()
        after = self._window(oracle, 1)
        alone = (before.seconds + after.seconds) / (before.images + after.images)
        fed = actual.seconds / actual.images
        return {"train_images_per_second": 1 / fed, "stall": stall(alone, fed)}

    def _planned(self) -> Callable[[], Iterator[Any]]:
        """Opens the batches of a registered loader, from the first."""
        kind, told = find("loader", self.settings["loader"]), self.settings
        self.loader = kind(
            self.store,
            views_of_idmm(told["resolution"], len(self.store)),
            Counters(0),
            batch_size=told["batch_size"],
            dtype=dtype_of("auto", self.device),
            device=self.device,
            options=kind.Options.model_validate(told["options"]),
        )
        return lambda: self.loader.batches(0)

    def _stock(self) -> Callable[[], Iterator[Any]]:
        """Opens the batches of a pipeline that is DALI's alone."""
        from fastidmm.bench.stock_dali import stock

        files = [Path(path) for path in Files.of(self.store).paths]
        groups = views_of_idmm(self.settings["resolution"], 2).views
        size, options = self.settings["batch_size"], self.settings["options"]
        return lambda: stock(files, groups, size, self.device, num_cores(), 0, **options)

    def _assembled(self) -> Parts:
        """All that training takes, in the place of the loader alone."""
        told = self.settings
        names = ("dataset", "backbone", "loader", "batch_size", "resolution", "device")
        run = {name: told[name] for name in names} | told["run"]
        tables = {"run": run, "loader": told["options"]}
        del self.loader, self.open
        self.parts = assembled(tables, self.store, Path(told["work"]))
        return self.parts

    def _on_one(self, parts: Parts, batch: Batch) -> Iterator[Stepped]:
        """Steps on a batch again and again, made as a run makes them."""
        gpu = self.device.type == "cuda"
        captured = Captured(parts) if gpu and parts.recipe.run.capture else None
        brake = Brake()
        while True:
            yield captured.step(0, batch) if captured else step(parts, batch)
            if gpu:
                brake()

    def _unsteady(self) -> int:
        """Batches until every worker has given one, and a cache is full."""
        ahead = num_cores() + 1
        if self.parts is not None and self.device.type == "cuda":
            ahead = max(ahead, 3 * self.parts.loader.steps_per_epoch)  # all is captured by then
        if self.settings["options"].get("cache"):
            ahead = max(ahead, num_steps(len(self.store), self.settings["batch_size"]))
        return ahead

    def _window(self, batches: Iterator[Any], lot: int) -> Turn:
        """As many lots of batches as it takes to be long enough; the first is not counted."""
        next(batches)
        synchronize(self.device)
        began, used = time.perf_counter(), cpu_seconds(os.getpid())
        images = crops = number = 0
        while number % lot or number < 2 or time.perf_counter() - began < self.settings["seconds"]:
            more = _counts(next(batches))
            images, crops, number = images + more[0], crops + more[1], number + 1
        synchronize(self.device)
        after = cpu_seconds(os.getpid())
        spent = time.perf_counter() - began
        return Turn(spent, after - used if after and used else None, images, crops)

    def _free(self) -> int:
        """Bytes of the GPU that nobody holds, whatever library took the others."""
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0


def _counts(batch: Any) -> tuple[int, int]:
    """Images and crops of a batch; the stock pipeline's is a list of views and the indices."""
    if isinstance(batch, Stepped):
        return batch.num_images, 0
    if isinstance(batch, Batch):
        return batch.num_images, batch.num_crops
    return len(batch[-1]), sum(map(len, batch[:-1]))


def _close(batches: Iterator[Any]) -> None:
    getattr(batches, "close", lambda: None)()


def main() -> None:
    """Answer orders until there are no more; what goes wrong is an answer, and the last."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        child = Child(json.loads(sys.argv[1]))
        answer = child.first()
        child.leave()
        say(answer)
        for order in sys.stdin:
            child.enter()
            answer = getattr(child, order.strip())()
            child.leave()
            say(answer)
    except FastidmmError as problem:
        say({"failed": str(problem)})
    except Exception as problem:
        say({"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]})


if __name__ == "__main__":
    main()
