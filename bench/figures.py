"""What the subjects of `fastidmm bench` answer with: rows of figures, and those as text.

A result is a dict that JSON can hold:

    subject, about, settings, surroundings, dataset (where there is one)
    tables   name -> rows; a row is name -> {"status": "ok", figure: value, ...}
    notes    sentences that belong under the tables

A figure is a key of `FIGURES`, its value a number, `None` where it cannot be known, or what
`measured` gives. A row's first figure is the one it is about. A row that could not be measured has
its status alone: "missing: ...", "failed: ...".
"""

from collections.abc import Callable, Sequence
from math import floor, log10
from statistics import median
from typing import Any, NamedTuple

from fastidmm.bench.surroundings import surroundings

Row = dict[str, Any]
Rows = dict[str, Row]


class Figure(NamedTuple):
    """How a kind of number is shown."""

    title: str
    style: str = ""  # as `format` takes it; "": three digits, all before the point
    more_is_better: bool = False
    means: str = ""  # where the title does not say it


FIGURES = {
    "images_per_second": Figure("images/s", more_is_better=True),
    "crops_per_second": Figure("crops/s", more_is_better=True),
    "milliseconds": Figure("ms"),
    "eager_milliseconds": Figure("eager ms"),
    "times": Figure("times", ".2f", means="times the first row"),
    "gain": Figure("gain", ".2f", True, "times the first row"),
    "share": Figure("share", ".0%"),
    "core_seconds": Figure("core-s/1000", means="seconds of a core for 1,000 images"),
    "train_images_per_second": Figure(
        "training", more_is_better=True, means="images/s learnt from"
    ),
    "stall": Figure("stall", ".1%", means="share of a training step spent waiting for data"),
    "mfu": Figure("MFU", ".1%", True, "share of the GPU's dense bf16 peak"),
    "warm_seconds": Figure("warm s", means="to a first batch, where one has been made before"),
    "cold_seconds": Figure("cold s", means="to a first batch, from starting Python"),
    "memory_mb": Figure("MB", means="memory of all processes"),
    "mapped_mb": Figure(
        "mapped", means="MB of libraries and stores, which the system may take back"
    ),
    "gpu_mb": Figure("GPU MB", means="the GPU's memory"),
    "error_z": Figure("dz", ".1e", means="relative error of the features' gradient"),
    "error_weight": Figure("dW", ".1e", means="relative error of the weight's gradient"),
}


def result(
    subject: str,
    about: str,
    tables: dict[str, Rows],
    *,
    settings: dict[str, Any],
    notes: Sequence[str] = (),
    dataset: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a subject found, and where."""
    found = {"subject": subject, "about": about, "settings": settings, "tables": tables}
    found |= {"notes": list(notes), "surroundings": surroundings()}
    return found | ({"dataset": dataset} if dataset else {})


def measured(values: Sequence[float]) -> dict[str, Any]:
    """Median, the middle half of the values (all of them where there are under four), the values.

    The middle half is what is left without a quarter of the values, rounded down, at either end.
    """
    found = sorted(values)
    quarter = len(found) // 4
    return {
        "median": _short(median(found)),
        "low": _short(found[quarter]),
        "high": _short(found[-1 - quarter]),
        "raw": [_short(value) for value in values],
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """`above` over `below`, turn by turn, so that a machine that slows down does so for both."""
    return measured([a / b for a, b in zip(above, below, strict=True)])


def stall(oracle: float, actual: float) -> float:
    """The share of a step spent waiting for data: its seconds without and with that wait."""
    return 1 - oracle / actual


def middle(value: Any) -> float | None:
    """The one number that stands for a figure's value."""
    number: float | None = value["median"] if isinstance(value, dict) else value
    return number


def shown(key: str, value: Any) -> str:
    """A figure's number as it is printed; "" where it is not known."""
    number = middle(value)
    if number is None:
        return ""
    digits = 0 if not number else max(0, 2 - floor(log10(abs(number))))
    return format(number, FIGURES[key].style or f",.{digits}f")


def spread(key: str, value: Any) -> str:
    """Between what a figure lies: "(1 to 3)", or "" for a single number."""
    if not isinstance(value, dict):
        return ""
    return f"({shown(key, value['low'])} to {shown(key, value['high'])})"


def keys_of(rows: Rows) -> list[str]:
    """The figures that any row of a table knows, in the order of the first that has them."""
    known = {key: None for row in rows.values() for key in row if row[key] is not None}
    return [key for key in known if key in FIGURES]


def text(found: dict[str, Any]) -> str:
    """A result as it is printed: a table of medians, the first figure with its spread."""
    lines = [f"{found['subject']}: {found['about']}"]
    for name, rows in found["tables"].items():
        lines += ["", name] if len(found["tables"]) > 1 else []
        lines += _table(rows)
    return "\n".join([*lines, *found["notes"]])


def _table(rows: Rows) -> list[str]:
    keys = keys_of(rows)
    good = {name: row for name, row in rows.items() if row["status"] == "ok"}
    columns: list[tuple[str, Callable[[Row], str]]] = []
    for place, key in enumerate(keys):
        columns.append((FIGURES[key].title, lambda row, key=key: shown(key, row.get(key))))  # type: ignore[misc]
        if place == 0:
            columns.append(("", lambda row, key=key: spread(key, row.get(key))))  # type: ignore[misc]
    first = max(map(len, rows))
    cells = {name: [cell(row) for _, cell in columns] for name, row in good.items()}
    widths = [
        max([len(title), *(len(cells[name][i]) for name in good)])
        for i, (title, _) in enumerate(columns)
    ]
    lines = [_line("", first, [title for title, _ in columns], widths)]
    for name, row in rows.items():
        told = f"{name:{first}}  {row['status']}"
        lines.append(_line(name, first, cells[name], widths) if name in good else told)
    return lines


def _line(name: str, first: int, cells: list[str], widths: list[int]) -> str:
    """The cells of a line below one another; the spread is read from its left."""
    aligned = [
        f"{cell:<{width}}" if place == 1 else f"{cell:>{width}}"
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join([f"{name:{first}}", *aligned]).rstrip()


def _short(value: float) -> float:
    """Six digits are more than any clock here has."""
    return float(f"{value:.6g}")
