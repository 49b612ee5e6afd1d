"""What lies in ./runs: all of it, one of it, the best, and what sets two apart."""

from pathlib import Path
from typing import Any

from fastidmm.compare import Compared
from fastidmm.errors import FastidmmError, UsageError
from fastidmm.folders import all_runs, stages
from fastidmm.progress import LABEL_FREE
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.stages import summary
from fastidmm.terminal import line

LOOKED = ("knn_top1", *LABEL_FREE)


def listed(dataset: str | None = None) -> list[dict[str, Any]]:
    """A row for each run, the one started last at the end; what is broken is a row that says so."""
    rows = [_row(folder) for folder in all_runs()]
    return [row for row in rows if dataset in (None, row.get("dataset"))]


def _row(folder: Path) -> dict[str, Any]:
    try:
        record = Record(folder)
        run = record.recipe.run
        begun = [stage for each in stages(folder) if not (stage := Record(each)).finished]
        state = ", ".join([_state(record), *(f"{s.folder.name} at {_state(s)}" for s in begun)])
        looks = [line for line in record.metrics() if line.keys() & set(LOOKED)]
        compared = Compared.of(folder)
    except Exception as problem:  # whatever lies in one folder, it costs the others nothing
        kind = "" if isinstance(problem, FastidmmError) else f"{type(problem).__name__}: "
        return {"run": folder.name, "state": f"broken: {kind}{problem}"}
    tuned = {name: arm.score for name, arm in compared.scores.items() if arm.epochs}
    return {
        "run": folder.name,
        "dataset": run.dataset,
        "backbone": run.backbone,
        "method": run.method,
        "epochs": run.epochs,
        "state": state,
        **{key: looks[-1].get(key) if looks else None for key in LOOKED},
        "finetuned": {name: score.as_dict() for name, score in tuned.items()},
        "seconds": round(compared.seconds, 1),
    }


def _state(record: Record) -> str:
    if record.finished:
        return "finished"
    state = f"step {record.steps:,} of {record.total_steps:,}"
    return f"{state} and going on" if record.running else state


def shown(folder: Path) -> list[dict[str, Any]]:
    """What a run and the stages in it say of themselves."""
    return [summary(Record(each)) for each in (folder, *stages(folder)) if Record(each).steps]


def best(dataset: str) -> list[dict[str, Any]]:
    """Runs of a dataset by their fine-tuned top-1, the highest first; and those not fine-tuned.

    On test images: whoever chooses by it has selected on them.
    """
    rows = [row for row in listed(dataset) if "dataset" in row]
    if not rows:
        raise UsageError(f"no runs of {dataset!r} in ./runs: `fastidmm runs list` shows what is.")
    return sorted(rows, key=lambda row: -_top(row))


def _top(row: dict[str, Any]) -> float:
    return max((score["value"] for score in row["finetuned"].values()), default=-1.0)


def apart(one: Path, other: Path) -> dict[str, dict[str, list[Any]]]:
    """Keys of recipe and environment in which two runs differ, with the value of each."""
    recipes = [_flat(Record(folder).recipe) for folder in (one, other)]
    around = [Record(folder).environment() for folder in (one, other)]
    for each in around:
        del each["command"]  # two that differ may mean the same
        each.pop("launch", None)
    return {"recipe": _differing(*recipes), "environment": _differing(*around)}


def _flat(recipe: Recipe) -> dict[str, Any]:
    tables = recipe.tables()
    return {f"{name}.{key}": v for name, table in tables.items() for key, v in table.items()}


def _differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    keys = dict.fromkeys([*one, *other])
    return {k: [one.get(k), other.get(k)] for k in keys if one.get(k) != other.get(k)}


# --- as text ------------------------------------------------------------------------------------


def as_table(rows: list[dict[str, Any]]) -> str:
    """Runs below one another."""
    if not rows:
        return "no runs in ./runs yet: begin with `fastidmm pretrain`"
    head = [
        "run", "dataset", "backbone", "method", "epochs", "state", "on training images",
        "fine-tuned", "time",
    ]  # fmt: skip
    cells = [head, *([line(cell) for cell in _cells(row)] for row in rows)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(head))]
    return "\n".join(
        "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=False)).rstrip() for row in cells
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if "dataset" not in row:
        return [row["run"], row["state"]]
    scores = [f"{100 * score['value']:.1f} % {_side(n)}" for n, score in row["finetuned"].items()]
    return [
        row["run"], row["dataset"], row["backbone"], row["method"], str(row["epochs"]),
        row["state"], _features(row),
        ", ".join(scores) or "-", f"{row['seconds'] / 60:.1f} min",
    ]  # fmt: skip


def _features(row: dict[str, Any]) -> str:
    """What tells most of a backbone not fine-tuned: kNN, without labels retrieval."""
    for key in ("knn_top1", "retrieval_top1"):
        if row[key] is not None:
            return f"{key.removesuffix('_top1')} {100 * row[key]:.1f} %"
    return "-"


def _side(name: str) -> str:
    """Of a measure's name what tells fine-tunings apart: the resolution."""
    return f"at {''.join(filter(str.isdigit, name))} px"


def as_lines(found: dict[str, dict[str, list[Any]]]) -> str:
    """What sets two runs apart, a line each."""
    lines = [
        f"{kind}: {key}: {one!r} | {other!r}"
        for kind, table in found.items()
        for key, (one, other) in table.items()
    ]
    return "\n".join(lines) or "the same recipe in the same environment"
