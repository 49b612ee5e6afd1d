"""All stages in a row: pretrain, fine-tune with and without pretraining, evaluate, report."""

from pathlib import Path
from typing import Any

from fastidmm.assemble import check_labels, training_rows
from fastidmm.backbones.build import check_resolution
from fastidmm.preparing.prepare import prepare
from fastidmm.progress import say
from fastidmm.ranks import world
from fastidmm.recipe import Recipe
from fastidmm.registry import find
from fastidmm.reporting.report import write
from fastidmm.scoring import check_split, evaluate
from fastidmm.stages import finetune, pretrain
from fastidmm.store import prepared


def prepare_demo() -> None:
    """Prepare the demonstration's photographs, where they are not yet."""
    if "demo" not in prepared():
        for line in prepare(find("dataset", "demo")().open(from_=None, seed=0), "demo").lines():
            say(line)


def run_all(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """What `evaluate` finds after all stages, and where the report is."""
    if recipe.run.dataset == "demo":
        world().tell(prepare_demo)
    check(recipe)
    folder = Path(pretrain(recipe, run)["run"])
    for pretrained in (True, False):
        finetune(folder, {}, [], pretrained=pretrained)
    if recipe.finetune_high.epochs:
        finetune(folder, {"run.resolution": recipe.finetune_high.resolution}, [])
    return world().tell(lambda: {**evaluate(folder), "report": str(write(folder))})


def check(recipe: Recipe) -> None:
    """Say what cannot be done before the first hour, not after it; no test file is opened."""
    check_labels(training_rows(recipe), recipe.run.dataset)
    check_split(recipe.run.dataset)
    check_resolution(recipe.run.backbone, recipe.finetune.resolution)
    if recipe.finetune_high.epochs:
        check_resolution(recipe.run.backbone, recipe.finetune_high.resolution)
