"""All stages in a row: pretrain, fine-tune with and without pretraining, evaluate, report."""

from typing import Any

from fastidmm.assemble import check_labels, training_rows
from fastidmm.backbones.build import check_resolution
from fastidmm.errors import Interrupted
from fastidmm.preparing.prepare import prepare
from fastidmm.progress import say
from fastidmm.ranks import world
from fastidmm.recipe import Recipe
from fastidmm.registry import find
from fastidmm.reporting.report import write
from fastidmm.scoring import check_split, evaluate
from fastidmm.stages import finetune, placed, trained
from fastidmm.store import prepared


def prepare_demo() -> None:
    """Prepare the demonstration's photographs, where they are not yet."""
    if "demo" not in prepared():
        for line in prepare(find("dataset", "demo")().open(from_=None, seed=0), "demo").lines():
            say(line)


def run_all(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """What `evaluate` finds after all stages, and where the report is.

    A run that was named goes on where it was stopped: stages that are done are passed over.
    """
    if recipe.run.dataset == "demo":
        world().tell(prepare_demo)
    check(recipe)
    say(outline(recipe))
    again = run is not None
    folder = placed(recipe, run, again=again)
    try:
        trained(folder)
        for pretrained in (True, False):
            finetune(folder, {}, [], pretrained=pretrained, again=again)
        if recipe.finetune_high.epochs:
            high = {"run.resolution": recipe.finetune_high.resolution}
            finetune(folder, high, [], again=again)
    except Interrupted as problem:
        # The stage's own remedy ends with that stage.
        told = str(problem).removesuffix(".")
        raise type(problem)(
            f"{told}, the same `fastidmm run` with `--run {folder}` through all stages."
        ) from None
    return world().tell(lambda: {**evaluate(folder), "report": str(write(folder))})


def outline(recipe: Recipe) -> str:
    """The stages to come, with their epochs and sizes."""
    run, tuned, high = recipe.run, recipe.finetune, recipe.finetune_high
    told = (
        f"pretraining {run.epochs} epochs at {run.resolution} px, then fine-tuning {tuned.epochs} "
        f"at {tuned.resolution} px, with pretraining and without"
    )
    return told + (f", and {high.epochs} at {high.resolution} px" if high.epochs else "")


def check(recipe: Recipe) -> None:
    """Say what cannot be done before the first hour, not after it; no test file is opened."""
    check_labels(training_rows(recipe), recipe.run.dataset)
    check_split(recipe.run.dataset)
    check_resolution(recipe.run.backbone, recipe.finetune.resolution)
    if recipe.finetune_high.epochs:
        check_resolution(recipe.run.backbone, recipe.finetune_high.resolution)
