"""The training step that benchmarks run: `train.steps` less what a run keeps of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastidmm import train
from fastidmm.assemble import Parts, assemble
from fastidmm.batch import Batch
from fastidmm.optim import update
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.store import Store

Mark = Callable[[str], None]


def assembled(tables: dict[str, Any], store: Store, work: Path) -> Parts:
    """What a recipe becomes over a store, ready to step; its run's folder goes into `work`."""
    parts = assemble(Record.create(work / "run", Recipe.of(tables), store), store)
    parts.method.train()
    return parts


def one_step(parts: Parts, batch: Batch, mark: Mark | None = None) -> None:
    """Forward, loss, backward and update; `mark` is called behind the last two."""
    parts.counters.step = batch.step
    loss = train.backward(parts, batch)
    if mark is not None:
        mark("backward")
    lr = parts.schedule(torch.full((), batch.step, device=parts.store.device))
    update(parts.optimizer, parts.method, loss.total, lr)
    parts.method.after_step(loss.keep, batch.step)
    if mark is not None:
        mark("update")
