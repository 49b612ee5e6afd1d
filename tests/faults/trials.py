"""What the trials of faults share: a small dataset, a run on it, its truth, a line per figure."""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from fastidmm import checkpoint, optim, stages
from fastidmm import step as stepping
from fastidmm.datasets.folder import Folder
from fastidmm.preparing.prepare import prepare
from fastidmm.recipe import Recipe
from fastidmm.record import Record

Outcome = tuple[list[Any], dict[str, torch.Tensor]]


class Figure(NamedTuple):
    """One promise, how often it was put to the test, and where it was broken."""

    promised: str
    trials: int
    broken: list[str]
    found: str = ""

    def __str__(self) -> str:
        found = self.found or f"{self.trials - len(self.broken)} of {self.trials}"
        return f"{self.promised}: {found}" + "".join(f"\n  broken: {b}" for b in self.broken)


class Killed(Exception):
    """Stands for a kill: nothing of ours may catch it."""


@contextmanager
def toy(place: Path) -> Iterator[None]:
    """Twelve photographs and four to test on, prepared as `toy`; ./runs below `place`."""
    chance, before = np.random.default_rng(0), Path.cwd()
    for split, number in (("train", 6), ("test", 2)):
        for label in range(2):
            folder = place / "photos" / split / f"class{label}"
            folder.mkdir(parents=True)
            for each in range(number):
                pixels = chance.integers(0, 255, (20 + each, 22, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{each}.png")
    os.chdir(place)
    try:
        with mock.patch.dict(os.environ, FASTIDMM_HOME=str(place / "home")):
            prepare_toy(place)
            yield
    finally:
        os.chdir(before)


def prepare_toy(place: Path) -> bool:
    """Prepare the photographs; whether anything had to be done."""
    source = Folder().open(from_=place / "photos", seed=0)
    return prepare(source, "toy", workers=0, quiet=True).fresh


def recipe() -> Recipe:
    """Six steps of three epochs, a checkpoint after every one."""
    run = {
        "dataset": "toy", "backbone": "vit_micro", "epochs": 3, "batch_size": 8, "resolution": 16,
        "checkpoint_every": 1, "device": "cpu",
    }  # fmt: skip
    return Recipe.of({"run": run, "backbone": {"drop_path": 0.3}})


def whole(name: str = "whole") -> Outcome:
    """What a run comes to that nothing happens to."""
    stages.pretrain(recipe(), name)
    return outcome(Path("runs") / name)


def stopped(name: str, before_update: int) -> Path:
    """A run that was killed before the update of that number, from 0."""
    calls, update = iter(range(1000)), optim.update

    def dying(*given: Any) -> Any:
        if next(calls) == before_update:
            raise Killed
        return update(*given)

    with mock.patch.object(stepping, "update", dying):
        try:
            stages.pretrain(recipe(), name)
        except Killed:
            return Path("runs") / name
    raise AssertionError("it was not killed")


def outcome(run: Path) -> Outcome:
    """The losses of a run by step, and its last weights."""
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    (weights,), _ = checkpoint.load(newest, checkpoint.MODEL)
    return [(line["step"], line["loss"]) for line in Record(run).metrics()], weights


def same(one: Outcome, other: Outcome) -> bool:
    """Whether not a bit differs."""
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    )


def main(about: str, figures: Callable[[int], list[Figure]], trials: int) -> None:
    """Print a line per figure; exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--trials", type=int, default=trials)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, toy(Path(place).resolve()):
        found = figures(given.trials)
    print("\n".join(map(str, found)))
    raise SystemExit(any(figure.broken for figure in found))
