"""A run as one page: what pretraining did, the curves, the pictures, how to repeat it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from fastidmm import checkpoint
from fastidmm.assemble import training_rows
from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.record import RECIPE, Record, stages
from fastidmm.registry import find
from fastidmm.reporting.claims import measures, percent, verdict
from fastidmm.reporting.commands import Stage, again, argument, missing
from fastidmm.reporting.curves import Series, chart
from fastidmm.reporting.pictures import Shown, shown
from fastidmm.scoring import EVALUATION, looks
from fastidmm.store import Store, folder_of, open_store, read_json

REPORT = "report.html"
# Title, key of a metric line, unit.
CURVES = (
    ("Pretraining loss", "loss", ""),
    ("Instance top-1: images recognised as themselves", "instance_top1", " %"),
    ("Contrast top-1: crops whose nearest other attracts them", "contrast_top1", " %"),
    ("Entropy of the teacher's probabilities, nats", "teacher_entropy", ""),
    ("Training top-1", "train_top1", " %"),
    ("kNN on training labels, leave-one-out", "knn_top1", " %"),
)
TUNED_CURVES = (
    ("Fine-tuning loss", "loss", ""),
    ("Fine-tuning: top-1 on training crops", "train_top1", " %"),
)


def write(run: Path) -> Path:
    """Write a run's `report.html`, complete in itself; returns its path."""
    if (run.parent / RECIPE).exists():
        raise UsageError(
            f"{run} is a stage; the report is its run's: `fastidmm report --run {run.parent}`."
        )
    page = _template().render(_facts(Stage(Record(run))))
    final, aside = run / REPORT, run / f".{REPORT}.{os.getpid()}"
    try:
        aside.write_text(page, encoding="utf-8")
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)
    return final


def remaining(run: Path) -> list[str]:
    """The commands that bring what a run lacks, in their order; its report is the last."""
    stage = Stage(Record(run))
    tuned = [Stage(Record(folder)) for folder in stages(run)]
    evaluation, scorable = _evaluation(run), _data(stage).scorable
    steps = missing(stage, tuned, evaluation["scores"] if evaluation else None, scorable=scorable)
    return [*(command for _, command in steps), f"fastidmm report --run {argument(run)}"]


def _template() -> Template:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["percent"] = percent
    return pages.get_template("report.html.j2")


def _facts(stage: Stage) -> dict[str, Any]:
    """All that the template shows."""
    run, data = stage.record.folder, _data(stage)
    tuned = [Stage(Record(folder)) for folder in stages(run)]
    evaluation = _evaluation(run)
    scores = evaluation["scores"] if evaluation else None
    newest = checkpoint.newest(stage.record.checkpoints)
    first_step = (max(stage.epoch, 1) - 1) * stage.steps_per_epoch
    images, no_images = _images(stage, data, first_step)
    return {
        "stage": stage,
        "run": stage.record.recipe.run,
        "learns_labels": find("method", stage.record.recipe.run.method).needs_labels,
        "data": data,
        "evaluation": evaluation,
        "measures": measures(scores) if scores else [],
        "looks": looks(run),
        "verdict": _verdict(data, evaluation),
        "missing": missing(stage, tuned, scores, scorable=data.scorable),
        "seconds": checkpoint.load(newest)[1]["seconds"] if newest else 0.0,
        "skipped": sum(int(line["skipped"]) for line in stage.lines),
        "charts": _charts(stage, tuned, learnable=data.learnable),
        "images": images,
        "no_images": no_images,
        "first_step": first_step,
        "commands": again(stage, tuned, evaluated=evaluation is not None),
        "recipe_text": (run / RECIPE).read_text(),
        "environment_text": json.dumps(stage.environment, indent=2, ensure_ascii=False),
    }


# --- the dataset as it stands now ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Data:
    """A run's dataset as it stands now; without a store, the reason."""

    store: Store | None
    problem: str
    learnable: bool  # there are classes to tell apart
    scorable: bool  # and a test split to do it on
    source: str = ""
    num_test: int = 0
    most_frequent: float | None = None  # the largest class's share of the test images


def _data(stage: Stage) -> Data:
    """The dataset, where it is still the one of the run."""
    dataset = stage.record.recipe.run.dataset
    try:
        store, folder = training_rows(stage.record.recipe), folder_of(dataset)
        if store.fingerprint != stage.environment["train_fingerprint"]:
            raise DataError(f"{dataset!r} was prepared anew since this run began.")
        described = read_json(folder)
        has_test = "test" in described["splits"]
        labels = open_store(folder, "test").label if has_test else torch.zeros(0)
    except FastidmmError as problem:
        # Only where there are labels is kNN among the metrics.
        labelled = any("knn_top1" in line for line in stage.lines)
        return Data(None, str(problem), learnable=labelled, scorable=labelled)
    learnable = store.labelled and store.num_classes > 1
    scorable = learnable and has_test and bool((labels >= 0).all())
    return Data(
        store,
        problem="",
        learnable=learnable,
        scorable=scorable,
        source=described.get("source", {}).get("description", ""),
        num_test=len(labels),
        most_frequent=float(labels.bincount().max() / len(labels)) if scorable else None,
    )


# --- what came of the run -----------------------------------------------------------------------


def _evaluation(run: Path) -> dict[str, Any] | None:
    path = run / EVALUATION
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as problem:
        raise DataError(f"{path} cannot be read ({problem}); evaluate the run again.") from None
    return found


def _verdict(data: Data, evaluation: dict[str, Any] | None) -> str:
    """The first sentence of the page."""
    if evaluation:
        found = measures(evaluation["scores"])
        return verdict(found, num_train=evaluation["num_train"], num_test=evaluation["num_test"])
    if data.scorable:
        return "Not evaluated yet: nothing can be said of what pretraining did."
    lack = "a test split" if data.learnable else "labels of at least two classes"
    return f"Without {lack} nothing can be scored: judge by the curves."


def _charts(run: Stage, tuned: Sequence[Stage], *, learnable: bool) -> list[Markup]:
    """Every curve there are points for."""
    charts = []
    for table, sources in ((CURVES, [run]), (TUNED_CURVES, tuned)):
        for title, key, unit in table:
            if key == "knn_top1" and not learnable:
                continue
            series = [_series(stage, key, factor=100.0 if unit else 1.0) for stage in sources]
            if any(s.points for s in series):
                charts.append(chart(title, series, unit=unit))
    return charts


def _series(stage: Stage, key: str, *, factor: float) -> Series:
    """A metric over epochs; values that were not finite are left out."""
    values = [(line["step"] / stage.steps_per_epoch, line.get(key)) for line in stage.lines]
    return Series(stage.name, [(epoch, factor * v) for epoch, v in values if v is not None])


def _images(stage: Stage, data: Data, step: int) -> tuple[list[Shown], str]:
    """The pictures of a step; or none, and the reason."""
    if data.store is None:
        return [], data.problem
    return shown(stage.record, data.store, step), ""
