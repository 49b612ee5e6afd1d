"""A run as one page: what pretraining did, the curves, the pictures, how to repeat it."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fastidmm.errors import UsageError
from fastidmm.folders import RECIPE, is_stage, stages
from fastidmm.forecast import spell
from fastidmm.preparing.files import write_whole
from fastidmm.record import Record
from fastidmm.registry import find
from fastidmm.reporting.beside import others, taken
from fastidmm.reporting.charts import charts
from fastidmm.reporting.claims import measures, percent, verdict
from fastidmm.reporting.commands import Stage, again, argument, missing
from fastidmm.reporting.dataset import Data, data_of
from fastidmm.reporting.inside import Inside, inside
from fastidmm.reporting.mistakes import mistakes
from fastidmm.reporting.pictures import Shown, shown
from fastidmm.scoring import current, looks
from fastidmm.terminal import written_out

REPORT = "report.html"


class Page:
    """A run's page, which can be made again as the run goes on."""

    def __init__(self, run: Path) -> None:
        if is_stage(run):
            raise UsageError(
                f"{run} is a stage; the report is its run's: `fastidmm report --run {run.parent}`."
            )
        self.run = run
        self._inside: dict[Path, Inside] = {}  # by checkpoint: a look takes long, and stays true

    def text(self, *, renew: int = 0) -> str:
        """The page as it stands now; read live, it asks for itself every `renew` seconds."""
        return written_out(_template().render(renew=renew, **self._facts(live=renew > 0)))

    def _facts(self, *, live: bool) -> dict[str, Any]:
        """All that the template shows."""
        stage = Stage(Record(self.run))
        data, evaluation = data_of(stage), current(self.run)
        tuned = [Stage(Record(folder)) for folder in stages(self.run)]
        scores = evaluation["scores"] if evaluation else None
        method = stage.record.recipe.run.method
        classes = method == "supervised"
        first_step = (max(stage.epoch, 1) - 1) * stage.steps_per_epoch
        images, no_images = _images(stage, data, first_step)
        seen, unseen = self._seen(stage, data, live=live)
        return {
            "stage": stage,
            "run": stage.record.recipe.run,
            "learns_labels": find("method", method).needs_labels and not classes,
            "data": data,
            "evaluation": evaluation,
            "measures": measures(scores, frozen=not classes) if scores else [],
            "mistakes": mistakes(evaluation) if evaluation else None,
            "looks": looks(self.run),
            "verdict": _verdict(stage, data, evaluation),
            "missing": missing(stage, tuned, scores, scorable=data.scorable),
            "taken": taken([stage, *tuned]),
            "others": others(self.run),
            "skipped": sum(int(line["skipped"]) for line in stage.lines),
            "charts": charts(stage, tuned, learnable=data.learnable),
            "images": images,
            "no_images": no_images,
            "seen": seen,
            "unseen": unseen,
            "first_step": first_step,
            "commands": again(stage, tuned, evaluated=evaluation is not None),
            "recipe_text": (self.run / RECIPE).read_text(),
            "environment_text": json.dumps(stage.environment, indent=2, ensure_ascii=False),
        }

    def _seen(self, stage: Stage, data: Data, *, live: bool) -> tuple[Inside | None, str]:
        """What the backbone makes of the training images; or none, and the reason."""
        if data.store is None:
            return None, f"The training images cannot be looked at: {data.problem}"
        if live and not stage.finished:
            return None, "The training images are looked at once this run is finished."
        path = stage.record.result
        if path not in self._inside:
            self._inside = {path: inside(stage.record, data.store, path)}
        return self._inside[path], ""


def write(run: Path) -> Path:
    """Write a run's `report.html`, complete in itself; returns its path."""
    write_whole(run / REPORT, Page(run).text())
    return run / REPORT


def remaining(run: Path) -> list[str]:
    """The commands that bring what a run, or a stage's, lacks; its report is the last."""
    run = run.parent if is_stage(run) else run
    stage = Stage(Record(run))
    tuned = [Stage(Record(folder)) for folder in stages(run)]
    evaluation, scorable = current(run), data_of(stage).scorable
    steps = missing(stage, tuned, evaluation["scores"] if evaluation else None, scorable=scorable)
    return [*(command for _, command in steps if command), f"fastidmm report --run {argument(run)}"]


def _template() -> Template:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["percent"] = percent
    pages.filters["spell"] = spell
    return pages.get_template("report.html.j2")


def _verdict(stage: Stage, data: Data, evaluation: dict[str, Any] | None) -> str:
    """The first sentence of the page."""
    classes = stage.record.recipe.run.method == "supervised"
    if classes and not stage.record.recipe.run.init:
        return "Trained from random weights: there is no pretraining to tell of."
    if evaluation:
        cause = f"Pretraining on these {stage.environment['num_train']:,} images"
        if classes:
            start = stage.record.init
            cause = f"Beginning with {start.parent.parent.name if start else 'timm'}'s weights"
        found = measures(evaluation["scores"], frozen=not classes)
        return verdict(found, cause, num_test=evaluation["num_test"])
    if data.scorable:
        return "Not evaluated yet: nothing can be said of what pretraining did."
    lack = "a test split" if data.learnable else "labels of at least two classes"
    return f"Without {lack} nothing can be scored: look at the neighbours and the curves."


def _images(stage: Stage, data: Data, step: int) -> tuple[list[Shown], str]:
    """The pictures of a step; or none, and the reason."""
    if data.store is None:
        return [], data.problem
    return shown(stage.record, data.store, step), ""
