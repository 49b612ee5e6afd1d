"""Score a run and its stages: what `evaluate` finds, keeps and prints."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fastidmm import checkpoint
from fastidmm.assemble import build_method, check_labels, same_images, training_rows
from fastidmm.backbones.build import build_encoder, load_weights
from fastidmm.chance import Counters
from fastidmm.errors import DataError, UsageError
from fastidmm.evaluate import Score, knn, linear_probe, measured, outputs
from fastidmm.folders import is_stage, stages
from fastidmm.loaders.memory import within_reach
from fastidmm.machine import dtype_of, set_up
from fastidmm.preparing.files import write_whole
from fastidmm.progress import say
from fastidmm.recipe import Recipe
from fastidmm.record import Record, encoder_weights
from fastidmm.reporting.claims import ARMS, FINETUNED, FROZEN
from fastidmm.store import Store, folder_of, has_split, open_store
from fastidmm.terminal import printable

EVALUATION = "evaluation.json"
SHOWN_CLASSES = 5


def evaluate(run: Path, device: str | None = None) -> dict[str, Any]:
    """Score a run and its stages on the test split, beside random weights; kept in the folder.

    On the device it was trained on, or another.
    """
    if is_stage(run):
        raise UsageError(
            f"{run} is a stage, scored with its run: `fastidmm evaluate --run {run.parent}`."
        )
    record = Record(run)
    record.check()
    recipe = record.recipe
    store, test = scored_splits(recipe)
    for each in (record, *map(Record, stages(run))):
        same_images(each, store.fingerprint)
    before = _evaluations(run)
    place = set_up(device or recipe.run.device, exact=recipe.run.exact)
    store, test = within_reach(store, place), within_reach(test, place)
    scores: dict[str, Any] = {
        "pretrained": frozen_scores(recipe, encoder_weights(record.result), store, test),
        "random": frozen_scores(recipe, None, store, test),
    }
    newest = newest_stages(run)
    for stage in classifiers(run):
        stage.check()
        arm, key = place_of(stage)
        if not stage.finished:
            say(f"not scored: {stage.unfinished}")
        elif (last := newest[arm, key].folder) != stage.folder:
            say(f"not scored: {stage.folder}, since {last} is newer and of the same resolution.")
        else:
            scores[arm][key] = stage_scores(stage, test)
    found = {
        "run": str(run),
        "dataset": recipe.run.dataset,
        "step": record.steps,
        "num_train": len(store),
        "num_test": len(test),
        "test_fingerprint": test.fingerprint,
        "class_names": test.class_names,
        "scores": scores,
        "evaluations": before + 1,
    }
    write_whole(run / EVALUATION, json.dumps(found))
    return found


def classifiers(run: Path) -> list[Record]:
    """What of a run has learnt classes: itself, if by labels, and its stages, oldest first."""
    return [r for r in map(Record, (run, *stages(run))) if r.recipe.run.method == "supervised"]


def place_of(stage: Record) -> tuple[str, str]:
    """The arm that a classifier's score is of, and its key there."""
    arm = "pretrained" if stage.pretrained else "random"
    return arm, f"{FINETUNED}{stage.resolution}"


def newest_stages(run: Path) -> dict[tuple[str, str], Record]:
    """The finished classifiers that count, the newest of each arm and resolution."""
    return {place_of(stage): stage for stage in classifiers(run) if stage.finished}


def kept(run: Path) -> dict[str, Any] | None:
    """What `evaluate` has kept in a run's folder; None: it has not been there."""
    path = run / EVALUATION
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        for cell in (cell for arm in ARMS for cell in found["scores"][arm].values()):
            Score(cell["correct"], cell["num"]).as_dict()
        if not isinstance(found["num_train"], int) or not isinstance(found["num_test"], int):
            raise TypeError("it counts no images")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as problem:
        raise DataError(f"{path} cannot be read ({problem}); evaluate the run again.") from None
    return found


def current(run: Path) -> dict[str, Any] | None:
    """What `evaluate` has kept of weights that still count: others were made since."""
    found = kept(run)
    if found is None:
        return None
    scores = {arm: dict(cells) for arm, cells in found["scores"].items()}
    if found.get("step") != Record(run).steps:
        scores["pretrained"] = {k: c for k, c in scores["pretrained"].items() if k not in FROZEN}
    for (arm, key), stage in newest_stages(run).items():
        if key in scores[arm] and scored(stage, found) != (arm, scores[arm][key]):
            del scores[arm][key]
    return {**found, "scores": scores}


def scored(stage: Record, evaluation: dict[str, Any] | None) -> tuple[str, dict[str, Any]] | None:
    """A stage's arm and cell in an evaluation, if that is of the checkpoint that counts now."""
    _, key = place_of(stage)
    own = stage.folder.name, checkpoint.step_of(stage.result)
    for arm, cells in evaluation["scores"].items() if evaluation else ():
        cell: dict[str, Any] = cells.get(key, {})
        if (cell.get("stage"), cell.get("step")) == own:
            return arm, cell
    return None


def _evaluations(run: Path) -> int:
    """How often a run was evaluated before; none where that can no longer be read."""
    try:
        return looks(run)["evaluate"]
    except DataError:
        say(
            f"warning: {run / EVALUATION} cannot be read and is written anew: earlier looks at the "
            "test images are no longer counted."
        )
        return 0


def looks(run: Path) -> dict[str, int]:
    """How often a run's test images were looked at: in fine-tuning, and by `evaluate`."""
    lines = [line for folder in (run, *stages(run)) for line in Record(folder).metrics()]
    found = kept(run)
    return {
        "finetune": sum("test_top1" in line for line in lines),
        "evaluate": found.get("evaluations", 1) if found else 0,
    }


def check_split(dataset: str) -> None:
    """Refuse a dataset without test images, unread."""
    if not has_split(dataset, "test"):
        raise DataError(f"{dataset!r} has no test split: prepare a folder with train/ and test/.")


def scored_splits(recipe: Recipe) -> tuple[Store, Store]:
    """Training images with labels and test split of a recipe's dataset; refused without any."""
    store = training_rows(recipe)
    check_labels(store, recipe.run.dataset)
    return store.with_labels(), open_store(folder_of(recipe.run.dataset), "test")


def frozen_scores(
    recipe: Recipe, weights: dict[str, Tensor] | None, store: Store, test: Store
) -> dict[str, Any]:
    """kNN and linear probe on the features of a backbone that is not trained further."""
    run, device = recipe.run, store.device
    encoder = build_encoder(
        run.backbone, recipe.backbone, resolution=run.resolution, counters=Counters(run.seed)
    )
    if weights is not None:
        load_weights(encoder, weights, source="the run's checkpoint")
    encoder.to(device)
    dtype = dtype_of(run.precision, device)
    known, asked = (
        outputs(encoder, split, resolution=run.resolution, dtype=dtype) for split in (store, test)
    )
    near = knn(known, store.label, asked, store.num_classes)
    probed = linear_probe(known, store.label, asked, store.num_classes)
    return {
        "knn": measured(near, test.label, votes=True),
        "linear_probe": measured(probed, test.label),
    }


def stage_scores(stage: Record, test: Store) -> dict[str, Any]:
    """The classifier of a fine-tuned stage on the test split, by the checkpoint that counts."""
    recipe, run, device = stage.recipe, stage.recipe.run, test.device
    (tensors,), _ = checkpoint.load(stage.result, checkpoint.MODEL)
    method = build_method(recipe, training_rows(recipe), Counters(run.seed))
    method.load_state_dict(tensors)
    classifier = method.classifier()
    if classifier is None:
        raise UsageError(f"{stage.folder} has no classifier: {run.method} learns no classes.")
    logits = outputs(
        classifier.to(device),
        test,
        resolution=run.resolution,
        dtype=dtype_of(run.precision, device),
    )
    return {
        **measured(logits, test.label),
        "epochs": run.epochs,
        "stage": stage.folder.name,
        "step": checkpoint.step_of(stage.result),
        "chosen": "best on held-out images" if run.holdout else "last epoch",
        "best": best(stage, "test"),
    }


def best(stage: Record, split: str) -> dict[str, Any] | None:
    """The best of a stage's scores on a split as it trained, which that split has selected."""
    key = f"{split}_top1"
    lines = [line for line in stage.metrics() if key in line]
    if not lines:
        return None
    top = max(lines, key=lambda line: line[key])
    return {"value": top[key], "epoch": top["epoch"], "of": len(lines), "selected_on": split}


def evaluation_text(found: dict[str, Any]) -> str:
    """The table a person reads: pretraining beside no pretraining."""
    scores = found["scores"]
    names = list(dict.fromkeys([*scores["pretrained"], *scores["random"]]))
    rows = [f"{'top-1 on ' + str(found['num_test']) + ' test images':<34}{'pretrained':<24}random"]
    for name in names:
        arms = [scores[arm].get(name) for arm in ("pretrained", "random")]
        rows.append(_row(name.replace("_", " "), [_cell(value) for value in arms]))
        if any(value and value["top5"] for value in arms):
            rows.append(_row("  top-5", [_cell(value and value["top5"]) for value in arms]))
        if any(_best(value) for value in arms):
            rows.append(_row("  best, selected on test images", [_best(value) for value in arms]))
    return "\n".join([*rows, *_classes_text(found)])


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<34}{cells[0]:<24}{cells[1]}".rstrip()


def _cell(value: dict[str, Any] | None) -> str:
    return str(Score(value["correct"], value["num"])) if value else "not run"


def _best(value: dict[str, Any] | None) -> str:
    top = value and value.get("best")
    if not top or top["of"] == 1:
        return ""
    return f"{100 * top['value']:.1f} % (epoch {top['epoch']})"


def _classes_text(found: dict[str, Any]) -> list[str]:
    """Where the last measure of the pretrained arm errs: worst classes, most frequent mistakes."""
    names = [printable(name) for name in found["class_names"]]
    measures = found["scores"]["pretrained"]
    measure = list(measures)[-1]
    classes = [
        (correct / num, f"{name} {correct}/{num}")
        for name, (correct, num) in zip(names, measures[measure]["per_class"], strict=True)
        if correct < num
    ]
    worst = [text for _, text in sorted(classes)[:SHOWN_CLASSES]]
    confused = [
        f"{names[true]} taken for {names[taken]} ({count})"
        for true, taken, count in measures[measure]["confusion"][:SHOWN_CLASSES]
    ]
    if not worst:
        return []
    return [
        f"\nby {measure.replace('_', ' ')}, pretrained:",
        f"  hardest: {', '.join(worst)}",
        f"  confused: {', '.join(confused)}",
    ]
