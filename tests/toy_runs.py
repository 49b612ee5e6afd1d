"""A small run and its stages, for the tests of fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import SMALL

from fastidmm import checkpoint, optim
from fastidmm import step as stepping
from fastidmm.recipe import Recipe
from fastidmm.record import Record

RUN = Path("runs/run")
FIRST = {"run.resolution": 16, "run.epochs": 7, "run.batch_size": 8}
HIGH = {"run.resolution": 32, "run.epochs": 7, "run.batch_size": 8}


class Killed(Exception):
    """Stands for a kill: nothing of ours may catch it."""


def kill_before_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Raise in place of the update with that number."""
    calls, update = iter(range(1000)), optim.update

    def dying(*args: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return update(*args)

    monkeypatch.setattr(stepping, "update", dying)


def recipe(**changes: Any) -> Recipe:
    """Pretraining of 21 steps, 7 epochs of 8, 8 and 4 images, and stages at 16 px and above."""
    run = {
        "dataset": "toy", "backbone": "vit_micro", "epochs": 7, "batch_size": 8, "resolution": 16,
        "checkpoint_every": 1, **changes,
    }  # fmt: skip
    finetune = {"resolution": 16, "epochs": 7, "batch_size": 8}
    method = SMALL.get(str(changes.get("method")), {})
    tables = {"run": run, "backbone": {"drop_path": 0.3}, "method": method, "finetune": finetune}
    return Recipe.of(tables)


def losses(folder: Path) -> list[float]:
    """Of every metric line."""
    return [line["loss"] for line in Record(folder).metrics()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    (tensors,), _ = checkpoint.load(path, checkpoint.MODEL)
    return tensors
