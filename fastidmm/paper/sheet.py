"""What came of a table: the paper's numbers and ours side by side, as Markdown and JSON."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from fastidmm import seeds
from fastidmm.evaluate import Score, differ
from fastidmm.paper.protocol import WHOLE, Cut
from fastidmm.paper.published import TITLES, Cell
from fastidmm.preparing.files import write_whole


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the paper, and what was measured of it, seed by seed."""

    cell: Cell
    runs: list[str]  # of each seed
    scores: list[Score | None]
    seconds: list[float | None]
    problem: str = ""  # why it was not measured, or not to the end
    cut: Cut = WHOLE  # how much of the protocol it is

    @property
    def found(self) -> list[Score]:
        """Of the seeds that are done."""
        return [score for score in self.scores if score is not None]

    @property
    def mean(self) -> Score | None:
        """Over seeds, as a share of the test images, which are the same for all."""
        if not self.found:
            return None
        num = self.found[0].num
        return Score(round(mean(score.value for score in self.found) * num), num)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %: that of the test images, or that of the seeds where it is wider."""
        if self.mean is None:
            return None
        low, high = self.mean.interval
        values = [score.value for score in self.found]
        if len(values) > 1 and 2 * seeds.half_width(values) > high - low:
            return seeds.interval(values)
        return low, high

    @property
    def difference(self) -> float | None:
        """Points by which ours is ahead of the paper's."""
        if self.mean is None or self.cell.published is None or self.cut != WHOLE:
            return None
        return 100 * self.mean.value - self.cell.published

    @property
    def differs(self) -> bool | None:
        """Whether that can be claimed: by the test of reports, and outside the interval."""
        if self.difference is None or self.mean is None or self.interval is None:
            return None
        published, (low, high) = (self.cell.published or 0.0) / 100, self.interval
        theirs = Score(round(published * self.mean.num), self.mean.num)
        return differ(self.mean, theirs) and not low <= published <= high

    @property
    def status(self) -> str:
        """`done`, or how far it is and why."""
        done, asked = len(self.found), len(self.scores)
        if done == asked:
            return "done"
        return " ".join(
            filter(None, ["not run" if not done else f"{done} of {asked} seeds", self._why])
        )

    @property
    def _why(self) -> str:
        return f"({self.problem})" if self.problem else ""

    @property
    def forecast(self) -> float | None:
        """Seconds for the seeds that lack, as long as the others took; None before the first."""
        known = [s for s in self.seconds if s is not None]
        lacking = len(self.scores) - len(self.found)
        return mean(known) * lacking if known and lacking and self.found else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        cell, ours = self.cell, self.mean
        return {
            "table": cell.table,
            "dataset": cell.dataset,
            "backbone": cell.backbone,
            "arm": cell.arm,
            "resolution": self.cut.side(cell.resolution),
            "epochs": self.cut.epochs(cell.epochs),
            "published": cell.published,
            "mean": None if ours is None else 100 * ours.value,
            "interval": self.interval and [100 * bound for bound in self.interval],
            "difference": self.difference,
            "differs": self.differs,
            "status": self.status,
            "forecast_seconds": self.forecast,
            "seeds": [
                {"run": run, "top1": score.as_dict() if score else None, "seconds": seconds}
                for run, score, seconds in zip(self.runs, self.scores, self.seconds, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True)
class Sheet:
    """All rows of a table that were asked for."""

    name: str
    table: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)  # how it was cut, before the numbers
    cut: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [row.as_dict() for row in self.rows]
        told = {"table": self.table, "title": TITLES[self.table], "notes": self.notes}
        return {**told, "cut": self.cut, "rows": rows}

    def markdown(self) -> str:
        """The table as people read it, on a terminal, too."""
        head = ["dataset", "backbone", "begins with", "px", "epochs"]
        head += ["paper", "ours", "95 %", "difference", "status", "forecast"]
        lines = [f"# {self.table}. {TITLES[self.table]}", "", *self.notes, ""]
        rows = [head, *(_texts(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """As `NAME.md` and `NAME.json` in ./runs, each whole or as it was before."""
        Path("runs").mkdir(exist_ok=True)
        for kind, text in (("md", self.markdown()), ("json", json.dumps(self.as_dict(), indent=2))):
            write_whole(Path("runs") / f"{self.name}.{kind}", text)


def _texts(row: Row) -> list[str]:
    """One line of the table."""
    cell, ours = row.cell, row.mean
    told = [cell.dataset, cell.backbone, cell.arm]
    told += [str(row.cut.side(cell.resolution)), str(row.cut.epochs(cell.epochs))]
    told.append("-" if cell.published is None else f"{cell.published:.1f}")
    told.append("-" if ours is None else f"{100 * ours.value:.1f}")
    told.append("-" if row.interval is None else "{:.1f} to {:.1f}".format(*_percent(row.interval)))
    if row.difference is None:
        told.append("-")
    else:
        told.append(f"{row.difference:+.1f}" + ("" if row.differs else " (none to claim)"))
    told.append(row.status)
    if len(row.found) == len(row.scores):
        return [*told, "-"]
    return [*told, "no forecast" if row.forecast is None else f"{row.forecast / 60:.1f} min"]


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return 100 * low, 100 * high
