"""A run beside others on the same images, and what each of its stages took."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidmm.compare import Compared
from fastidmm.folders import stages
from fastidmm.forecast import kept
from fastidmm.record import Record
from fastidmm.reporting.claims import Arm, Outcome, by_chance
from fastidmm.reporting.commands import Stage

MOST_RUNS = 20
LOOKS = {"knn_top1": "kNN on training labels", "retrieval_top1": "retrieval"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A score of another run, and what can be claimed of it beside this run's."""

    arm: Arm
    outcome: Outcome
    why: str  # not comparable, beyond unequal epochs


@dataclass(frozen=True, slots=True)
class Other:
    """A run on the same images."""

    name: str
    what: str
    epochs: int
    seconds: float
    looked: float | None  # the share that `Others.look` names, as last logged
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, slots=True)
class Others:
    """This run and then the others, the newest first, by the measures that any has."""

    look: str  # at the training images while it learnt
    measures: tuple[str, ...]
    rows: tuple[Other, ...]

    @property
    def by_chance(self) -> str:
        """What to say of so many tests; "" of a handful."""
        return by_chance([cell.outcome for row in self.rows[1:] for cell in row.cells if cell])


@dataclass(frozen=True, slots=True)
class Taken:
    """A stage: what it took, and what it had forecast after its first steps."""

    stage: Stage
    seconds: float
    forecast: dict[str, float]


def others(run: Path) -> Others:
    """The run beside its neighbours in ./runs, or wherever it lies."""
    this = Compared.of(run)
    found = [this]
    for folder in reversed(stages(run.parent)):
        if folder.name == run.name:
            continue
        try:
            other = Compared.of(folder)
        except Exception:  # whatever lies in another's folder, it costs this page nothing
            continue
        if other.images == this.images:
            found.append(other)
    found = found[: MOST_RUNS + 1]
    names = tuple(dict.fromkeys(name for other in found for name in other.scores))
    lines = [Record(other.folder).metrics() for other in found]
    key = next((key for key in LOOKS if any(key in line for line in lines[0])), "knn_top1")
    rows = (_row(*pair, this, names, key) for pair in zip(found, lines, strict=True))
    return Others(LOOKS[key], names, tuple(rows))


def _row(
    other: Compared, lines: list[dict[str, Any]], this: Compared, names: Sequence[str], key: str
) -> Other:
    recipe = Record(other.folder).recipe.run
    told = [line[key] for line in lines if line.get(key) is not None]
    cells = []
    for name in names:
        arm = other.scores.get(name)
        measure, why = other.beside(this, name)
        cells.append(Cell(arm, "unequal" if why else measure.outcome, why) if arm else None)
    return Other(
        name=other.folder.name,
        what=f"{recipe.backbone}, {recipe.method}",
        epochs=recipe.epochs,
        seconds=other.seconds,
        looked=told[-1] if told else None,
        cells=tuple(cells),
    )


def taken(parts: Sequence[Stage]) -> list[Taken]:
    """What a run and its stages took."""
    return [Taken(part, part.record.seconds, kept(part.record.folder)) for part in parts]
