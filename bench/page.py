"""Results as one page, complete in itself: bars with their spread, and every figure below."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastidmm.bench.figures import FIGURES, Rows, keys_of, middle, shown, spread


def subjects(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in what a subject, or all of them, answered."""
    return list(found["subjects"].values()) if "subjects" in found else [found]


def html(found: dict[str, Any]) -> str:
    """The page of a result, or of several under "subjects"."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = pages.get_template("page.html.j2")
    return template.render(
        subjects=[(each, _tables(each)) for each in subjects(found)],
        surroundings=found["surroundings"],
    )


def _tables(subject: dict[str, Any]) -> list[dict[str, Any]]:
    """Every table of a subject as the template draws it."""
    alone = len(subject["tables"]) == 1
    return [_table("" if alone else n, rows) for n, rows in subject["tables"].items()]


def _table(name: str, rows: Rows) -> dict[str, Any]:
    keys = keys_of(rows)
    main = keys[0] if keys else ""
    most = max(_ends(row.get(main))[1] for row in rows.values()) or 1.0
    bars = []
    for label, row in rows.items():
        low, high = (100 * end / most for end in _ends(row.get(main)))
        cells = [(shown(key, row.get(key)), spread(key, row.get(key))) for key in keys]
        length = 100 * (middle(row.get(main)) or 0.0) / most
        bar = {"low": low, "wide": high - low, "length": length, "cells": cells}
        bars.append({"name": label, "status": row["status"], **bar})
    figure = FIGURES.get(main)
    better = "more" if figure and figure.more_is_better else "less"
    return {
        "name": name,
        "about": f"{figure.title}, {better} is better" if figure else "",
        "titles": [FIGURES[key].title for key in keys],
        "legend": [(FIGURES[key].title, FIGURES[key].means) for key in keys if FIGURES[key].means],
        "rows": bars,
    }


def _ends(value: Any) -> tuple[float, float]:
    """Between what a figure lies."""
    if isinstance(value, dict):
        return value["low"], value["high"]
    return (value or 0.0,) * 2
