"""All stages in a row: pretrain, fine-tune with and without pretraining, evaluate, report."""

from pathlib import Path
from typing import Any

from fastidmm.preparing.prepare import prepare
from fastidmm.progress import say
from fastidmm.recipe import Recipe
from fastidmm.registry import find
from fastidmm.reporting.report import write
from fastidmm.scoring import evaluate, scored_splits
from fastidmm.stages import finetune, pretrain
from fastidmm.store import prepared


def run_all(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """What `evaluate` finds after all stages, and where the report is."""
    if recipe.run.dataset == "demo" and "demo" not in prepared():
        for line in prepare(find("dataset", "demo")().open(from_=None, seed=0), "demo").lines():
            say(line)
    scored_splits(recipe)  # what can't be scored is said before the first hour, not after it
    folder = Path(pretrain(recipe, run)["run"])
    for pretrained in (True, False):
        finetune(folder, {}, [], pretrained=pretrained)
    if recipe.finetune_high.epochs:
        finetune(folder, {"run.resolution": recipe.finetune_high.resolution}, [])
    return {**evaluate(folder), "report": str(write(folder))}
