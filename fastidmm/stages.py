"""The commands' work: pretrain, fine-tune, evaluate, and all of it in a row."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm import checkpoint
from fastidmm.assemble import build_method, check_labels, training_rows
from fastidmm.backbones.build import build_encoder, load_encoder
from fastidmm.batch import Method
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.evaluate import Score, knn, linear_probe, outputs, score
from fastidmm.machine import device_of, dtype_of, set_up
from fastidmm.progress import SHOWN, say
from fastidmm.recipe import Recipe, with_settings
from fastidmm.record import RECIPE, Record, free_folder, newest_weights, run_folder, stages
from fastidmm.registry import find
from fastidmm.store import Store, folder_of, has_split, open_store
from fastidmm.train import train

EVALUATION = "evaluation.json"


def pretrain(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """Pretrain a recipe in a new run folder; what came out."""
    stem = f"{recipe.run.dataset}_{recipe.run.backbone}_{recipe.run.method}".replace(":", "-")
    folder = run_folder(run) if run else free_folder(run_folder(stem[:60]))
    store = training_rows(recipe)
    tried(recipe, store)
    record = Record.create(folder, recipe, store)
    train(record)
    return summary(record)


def tried(recipe: Recipe, store: Store) -> Method:
    """The recipe's method, built to see that it can be, before anything is written."""
    device_of(recipe.run.device)
    return build_method(recipe, store, Counters(recipe.run.seed))


def finetune(
    run: Path, settings: dict[str, Any], assignments: list[str], *, pretrained: bool = True
) -> dict[str, Any]:
    """Fine-tune a run's backbone, or the same one from random weights, in a stage folder."""
    parent = Record(run)
    wanted = settings.get("run.backbone")
    if (run.parent / RECIPE).exists():
        raise UsageError(f"{run} is a stage of {run.parent}; fine-tune that: --run {run.parent}.")
    if wanted not in (None, parent.recipe.run.backbone):
        raise UsageError(f"{run} was trained with {parent.recipe.run.backbone}, not {wanted}.")
    if any(text.strip().startswith("finetune.") for text in assignments):
        raise UsageError(
            "[finetune] is read when a run begins; here, set the stage's own keys: run.epochs, "
            "run.batch_size, run.resolution, optim.lr."
        )
    if pretrained and not parent.finished:
        raise UsageError(f"{run} is not finished: `fastidmm resume {run}` goes on with it.")
    tables = finetune_tables(parent, pretrained=pretrained)
    recipe = Recipe.of(with_settings(tables, settings, assignments))
    store = training_rows(recipe)
    method = tried(recipe, store)
    if pretrained:
        load_encoder(method.backbone, newest_weights(run), source=str(run))
    name = f"{'finetune' if pretrained else 'scratch'}-{recipe.run.resolution}"
    record = Record.create(free_folder(run / name), recipe, store)
    train(record)
    return summary(record)


def finetune_tables(parent: Record, *, pretrained: bool) -> dict[str, dict[str, Any]]:
    """The recipe of a fine-tuning stage, from its run's recipe."""
    old = parent.recipe
    settings = old.finetune.model_dump(exclude_none=True)
    optim = old.optim.model_dump(exclude={"warmup_epochs", "lr"})
    optim["lr"] = settings.pop("lr", old.optim.lr)
    newest = checkpoint.newest(parent.checkpoints)
    if pretrained and newest is None:
        raise UsageError(f"{parent.folder} has no checkpoint: `fastidmm resume {parent.folder}`.")
    init = f"../checkpoints/{newest.name}" if pretrained and newest else ""
    kept = old.run.model_dump(
        include={
            "dataset",
            "backbone",
            "loader",
            "seed",
            "device",
            "precision",
            "exact",
            "num_images",
        }
    )
    return {
        "run": {**kept, **settings, "method": "supervised", "init": init},
        "optim": optim,
        "backbone": old.backbone.model_dump(),
    }


def summary(record: Record) -> dict[str, Any]:
    """What a finished stage says of itself; a fine-tuned one with its test accuracy."""
    recipe, newest = record.recipe, checkpoint.newest(record.checkpoints)
    last = (record.metrics() or [{}])[-1]
    seconds = checkpoint.load(newest)[1]["seconds"] if newest else 0.0
    found = {
        "run": str(record.folder),
        "dataset": recipe.run.dataset,
        "backbone": recipe.run.backbone,
        "method": recipe.run.method,
        "epochs": recipe.run.epochs,
        "steps": record.steps,
        "seconds": round(seconds, 1),
        "checkpoint": str(newest),
        **{key: last[key] for key in SHOWN if key in last},
    }
    if find("method", recipe.run.method).needs_labels and has_split(recipe.run.dataset, "test"):
        device = set_up(recipe.run.device, exact=recipe.run.exact)
        test = open_store(folder_of(recipe.run.dataset), "test").to(device)
        found["test_top1"] = classifier_score(record, test).as_dict()
    return found


def resume(run: Path) -> list[dict[str, Any]]:
    """Go on with whatever of a run is not finished: itself, then its stages."""
    records = [Record(folder) for folder in (run, *stages(run))]
    for record in records:
        train(record)
    return [summary(record) for record in records]


def evaluate(run: Path) -> dict[str, Any]:
    """Score a run and its stages on the test split, beside random weights; kept in the folder."""
    record = Record(run)
    recipe = record.recipe
    store, test = scored_splits(recipe)
    device = set_up(recipe.run.device, exact=recipe.run.exact)
    store, test = store.to(device), test.to(device)
    scores: dict[str, Any] = {
        "pretrained": frozen_scores(recipe, newest_weights(run), store, test),
        "random": frozen_scores(recipe, None, store, test),
    }
    for folder in stages(run):
        stage = Record(folder)
        if not stage.finished:
            say(f"{folder} is not finished and not scored: `fastidmm resume {run}` goes on.")
            continue
        key = f"finetuned_{stage.recipe.run.resolution}"
        scores["pretrained" if stage.recipe.run.init else "random"][key] = {
            **classifier_score(stage, test).as_dict(),
            "epochs": stage.recipe.run.epochs,
            "stage": folder.name,
        }
    found = {
        "run": str(run),
        "dataset": recipe.run.dataset,
        "step": record.steps,
        "num_train": len(store),
        "num_test": len(test),
        "scores": scores,
    }
    aside = run / f".{EVALUATION}"
    aside.write_text(json.dumps(found, indent=2))
    aside.replace(run / EVALUATION)
    return found


def scored_splits(recipe: Recipe) -> tuple[Store, Store]:
    """Training and test split of a recipe's dataset, refused where they cannot be scored."""
    store = training_rows(recipe)
    check_labels(store, recipe.run.dataset)
    return store, open_store(folder_of(recipe.run.dataset), "test")


def frozen_scores(
    recipe: Recipe, weights: dict[str, Tensor] | None, store: Store, test: Store
) -> dict[str, Any]:
    """kNN and linear probe on the features of a backbone that is not trained further."""
    run, device = recipe.run, store.pixels.device
    encoder = build_encoder(
        run.backbone, recipe.backbone, resolution=run.resolution, counters=Counters(run.seed)
    )
    if weights is not None:
        load_encoder(encoder, weights, source="the run's newest checkpoint")
    encoder.to(device)
    dtype = dtype_of(run.precision, device)
    known, asked = (
        outputs(encoder, split, resolution=run.resolution, dtype=dtype) for split in (store, test)
    )
    near = knn(known, store.label, asked, store.num_classes)
    probed = linear_probe(known, store.label, asked, store.num_classes)
    return {
        "knn": score(near, test.label).as_dict(),
        "linear_probe": score(probed, test.label).as_dict(),
    }


def classifier_score(stage: Record, test: Store) -> Score:
    """Top-1 of a fine-tuned stage's newest checkpoint on the test split."""
    run, device = stage.recipe.run, test.pixels.device
    path = checkpoint.newest(stage.checkpoints)
    if path is None:
        raise UsageError(f"{stage.folder} has no checkpoint: `fastidmm resume {stage.folder}`.")
    (tensors,), _ = checkpoint.load(path, checkpoint.MODEL)
    encoder = build_encoder(
        run.backbone, stage.recipe.backbone, resolution=run.resolution, counters=Counters(run.seed)
    )
    num_classes, width = tensors["head.weight"].shape
    model = torch.nn.ModuleDict({"backbone": encoder, "head": torch.nn.Linear(width, num_classes)})
    model.load_state_dict(tensors)
    classifier = torch.nn.Sequential(model["backbone"], model["head"]).to(device)
    logits = outputs(
        classifier,
        test,
        resolution=run.resolution,
        dtype=dtype_of(run.precision, device),
    )
    return score(logits.argmax(dim=1), test.label)


def evaluation_text(found: dict[str, Any]) -> str:
    """The table a person reads: pretraining beside no pretraining."""
    scores = found["scores"]
    names = list(dict.fromkeys([*scores["pretrained"], *scores["random"]]))
    rows = [f"{'top-1 on ' + str(found['num_test']) + ' test images':<34}{'pretrained':<24}random"]
    for name in names:
        cells = [_cell(scores[arm].get(name)) for arm in ("pretrained", "random")]
        rows.append(f"{name.replace('_', ' '):<34}{cells[0]:<24}{cells[1]}")
    return "\n".join(rows)


def _cell(value: dict[str, Any] | None) -> str:
    return str(Score(value["correct"], value["num"])) if value else "not run"
