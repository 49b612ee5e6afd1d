"""The commands' work: pretrain, fine-tune, evaluate, and all of it in a row."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastidmm import checkpoint
from fastidmm.assemble import Parts, check_labels, training_rows
from fastidmm.backbones.build import build_encoder, load_encoder
from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.errors import UsageError
from fastidmm.evaluate import Score, knn, linear_probe, outputs, score
from fastidmm.machine import device_of, dtype_of
from fastidmm.progress import say
from fastidmm.recipe import Recipe, with_settings
from fastidmm.record import Record, free_folder, newest_weights, run_folder, stages
from fastidmm.store import Store, folder_of, open_store
from fastidmm.train import train

EVALUATION = "evaluation.json"
PLAIN = ViewGroup(count=1, size=0, scale=(1.0, 1.0))  # normalisation only: evaluation has no chance


def pretrain(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """Pretrain a recipe in a new run folder; what came out."""
    stem = f"{recipe.run.dataset}_{recipe.run.backbone}_{recipe.run.method}".replace(":", "-")
    folder = run_folder(run) if run else free_folder(run_folder(stem[:60]))
    record = Record.create(folder, recipe, training_rows(recipe))
    return summary(train(record))


def finetune(
    run: Path, settings: dict[str, Any], assignments: list[str], *, pretrained: bool = True
) -> dict[str, Any]:
    """Fine-tune a run's backbone, or the same one from random weights, in a stage folder."""
    parent = Record(run)
    if parent.recipe.run.method == "supervised":
        raise UsageError(f"{run} is a fine-tuning stage; name the run it is in.")
    wanted = settings.get("run.backbone")
    if wanted not in (None, parent.recipe.run.backbone):
        raise UsageError(f"{run} was trained with {parent.recipe.run.backbone}, not {wanted}.")
    tables = finetune_tables(parent, pretrained=pretrained)
    recipe = Recipe.of(with_settings(tables, settings, assignments))
    name = f"{'finetune' if pretrained else 'scratch'}-{recipe.run.resolution}"
    folder = free_folder(run / name)
    store = training_rows(recipe)
    if pretrained:
        # Before anything is written: the checkpoint must be there and fit.
        fit = build_encoder(
            recipe.run.backbone,
            recipe.backbone,
            resolution=recipe.run.resolution,
            counters=Counters(recipe.run.seed),
        )
        load_encoder(fit, newest_weights(run), source=str(run))
    return summary(train(Record.create(folder, recipe, store)))


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


def summary(parts: Parts) -> dict[str, Any]:
    """What a finished stage says of itself."""
    last = parts.record.metrics()[-1]
    known = ("loss", "instance_top1", "train_top1", "knn_top1")
    return {
        "run": str(parts.record.folder),
        "dataset": parts.recipe.run.dataset,
        "backbone": parts.recipe.run.backbone,
        "method": parts.recipe.run.method,
        "epochs": parts.recipe.run.epochs,
        "steps": parts.state.step,
        "seconds": round(parts.state.seconds, 1),
        "checkpoint": str(checkpoint.newest(parts.record.checkpoints)),
        **{key: last[key] for key in known if key in last},
    }


def resume(run: Path) -> list[dict[str, Any]]:
    """Go on with whatever of a run is not finished: itself, then its stages."""
    return [summary(train(Record(folder))) for folder in (run, *stages(run))]


def evaluate(run: Path) -> dict[str, Any]:
    """Score a run and its stages on the test split, beside random weights; kept in the folder."""
    record = Record(run)
    recipe = record.recipe
    store = training_rows(recipe)
    check_labels(store, recipe.run.dataset)
    test = open_store(folder_of(recipe.run.dataset), "test")
    device = device_of(recipe.run.device)
    store, test = store.to(device), test.to(device)
    scores: dict[str, Any] = {}
    weights = newest_weights(run)
    for arm, state in (("pretrained", weights), ("random", None)):
        scores[arm] = frozen_scores(recipe, state, store, test)
    for folder in stages(run):
        stage = Record(folder)
        arm = "pretrained" if stage.recipe.run.init else "random"
        key = f"finetuned_{stage.recipe.run.resolution}"
        scores[arm][key] = classifier_score(stage, test).as_dict()
        scores[arm][key]["epochs"] = stage.recipe.run.epochs
    found = {
        "run": str(run),
        "dataset": recipe.run.dataset,
        "num_train": len(store),
        "num_test": len(test),
        "scores": scores,
    }
    aside = run / f".{EVALUATION}"
    aside.write_text(json.dumps(found, indent=2))
    aside.replace(run / EVALUATION)
    return found


def frozen_scores(
    recipe: Recipe, weights: dict[str, Tensor] | None, store: Store, test: Store
) -> dict[str, Any]:
    """kNN and linear probe on the features of a backbone that is not trained further."""
    run, device = recipe.run, store.pixels.device
    encoder = build_encoder(
        run.backbone, recipe.backbone, resolution=run.resolution, counters=Counters(run.seed)
    )
    if weights is not None:
        say(load_encoder(encoder, weights, source="the run's newest checkpoint"))
    encoder.to(device)
    dtype = dtype_of(run.precision, device)
    known, asked = (
        outputs(encoder, split, resolution=run.resolution, group=PLAIN, dtype=dtype)
        for split in (store, test)
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
        group=PLAIN,
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
