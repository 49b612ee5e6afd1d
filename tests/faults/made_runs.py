"""Finished runs with made-up weights, which nobody had to train."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastidmm import checkpoint
from fastidmm.assemble import State, build_method, training_rows
from fastidmm.batch import Method
from fastidmm.chance import Counters
from fastidmm.recipe import Recipe
from fastidmm.record import Record


def made_run(
    folder: Path,
    backbone: str = "vit_micro",
    resolution: int = 32,
    method: str = "idmm",
    **run: Any,
) -> Method:
    """A finished run in a folder, of the dataset `toy`; the method it holds, for the truth."""
    asked = {"dataset": "toy", "backbone": backbone, "method": method, "resolution": resolution}
    recipe = Recipe.of({"run": {**asked, "epochs": 2, "batch_size": 8, **run}})
    store = training_rows(recipe)
    record = Record.create(folder, recipe, store)
    found = build_method(recipe, store, Counters(0))
    stir(found, 1)
    save(record, record.total_steps, found)
    return found.eval()


def stir(method: nn.Module, seed: int) -> None:
    """Other weights, also where a fresh model has zeros or ones; statistics stay positive."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in method.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape, generator=chance)


def save(
    record: Record, step: int, method: nn.Module, folder: Path | None = None, **state: Any
) -> None:
    """A checkpoint of these weights."""
    told = asdict(State(step=step, **state))
    checkpoint.save(
        folder or record.checkpoints, step, {checkpoint.MODEL: method.state_dict()}, told
    )


def noise(resolution: int, num: int = 3) -> torch.Tensor:
    """Images that no exporter was shown."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(num, 3, resolution, resolution, generator=generator)
