"""What benchmarks train: a recipe over a store of their own."""

from pathlib import Path
from typing import Any

from fastidmm.assemble import Parts, assemble
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.store import Store


def assembled(tables: dict[str, Any], store: Store, work: Path) -> Parts:
    """What a recipe becomes over a store, ready to step; its run's folder goes into `work`."""
    parts = assemble(Record.create(work / "run", Recipe.of(tables), store), store)
    parts.method.train()
    return parts
