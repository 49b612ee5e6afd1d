"""The commands' work: pretrain, fine-tune, resume."""

import os
import re
import shlex
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from fastidmm import logs
from fastidmm.apex import check
from fastidmm.assemble import (
    build_method,
    check_labels,
    check_memory,
    initialise,
    same_images,
    split_rows,
    training_rows,
)
from fastidmm.backbones.build import backbone
from fastidmm.batch import Options
from fastidmm.chance import Counters
from fastidmm.errors import DataError, Followed, UsageError
from fastidmm.evaluate import Score
from fastidmm.folders import RECIPE, SCRATCH, free_folder, is_stage, numbered, run_folder, stages
from fastidmm.loaders.choose import settled
from fastidmm.machine import device_of
from fastidmm.progress import LABEL_FREE, SHOWN, say
from fastidmm.quality import rising
from fastidmm.ranks import launched, restarts, world
from fastidmm.recipe import FinetuneHighOptions, Recipe, Tables, with_settings
from fastidmm.record import Record
from fastidmm.registry import find
from fastidmm.scoring import best
from fastidmm.store import folder_of, has_split, open_store
from fastidmm.train import train

LATEST = 10  # metric lines: a single small batch says little
# What a stage takes over from the run, or the stage, that it starts from.
KEPT = (
    "dataset", "backbone", "loader", "seed", "device", "precision", "optimizer", "exact", "capture",
    "views_ahead", "compile", "num_images", "holdout", "patience", "score_every", "log",
)  # fmt: skip


def pretrain(recipe: Recipe, run: str | None) -> dict[str, Any]:
    """Pretrain a recipe in a new run folder; what came out."""
    return trained(placed(recipe, run))


def placed(recipe: Recipe, run: str | None, *, again: bool = False) -> Path:
    """The folder of a run that is to be trained, by its name or one that says what it is.

    With `again` a run of that name and this very recipe is gone on with.
    """
    name = run or called(recipe.run.dataset, recipe.run.backbone, recipe.run.method)
    return _placed(run_folder(name), recipe, named=bool(run), again=again)


def called(*words: object) -> str:
    """What to call a run that was given no name, with room for a number."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(map(str, words))).lstrip("._-")[:60]


def begun(folder: Path, recipe: Recipe) -> Record:
    """The record of a recipe in a new folder. What cannot be done is said before."""
    device = device_of(recipe.run.device)
    check(recipe.run.optimizer, device)
    logs.check(recipe.run.log)
    store = training_rows(recipe)
    if find("method", recipe.run.method).needs_labels:
        whole = open_store(folder_of(recipe.run.dataset), "train")
        if len(whole.with_labels()) < len(whole):
            say(f"training on {len(store)} images: others have no labels.")
    recipe, why = settled(recipe, store, device)
    if why:
        say(why)
    find("loader", recipe.run.loader).check(store)
    method = build_method(recipe, store, Counters(recipe.run.seed))
    check_memory(recipe, method, len(store), device)
    initialise(method, folder, recipe)
    return Record.create(folder, recipe, store)


def following(run: Path) -> list[str]:
    """What can be done with the newest run once it is pretrained: what needs labels, if it has."""
    recipe = Record(run).recipe
    # Without a name the newest in ./runs is meant.
    named = [] if run.parent == Path("runs") else ["--run", shlex.quote(str(run))]
    if training_rows(recipe).learnable:
        return [" ".join(["fastidmm finetune", *named, *flags_in_proportion(recipe)])]
    embed = ["fastidmm embed", *named, "--from PHOTOS --out features.npz"]
    return [" ".join(["fastidmm report", *named]), " ".join(embed)]


def after_finetuning(run: Path) -> str:
    """What can be done with a run that has learnt classes: scoring takes test images."""
    scorable = has_split(Record(run).recipe.run.dataset, "test")
    return f"fastidmm {'evaluate' if scorable else 'report'} --run {shlex.quote(str(run))}"


def flags_in_proportion(recipe: Recipe) -> list[str]:
    """Of fine-tuning after a pretraining that is smaller than the recipe's fine-tuning is made for.

    The paper's doubles the resolution and takes fewer epochs.
    """
    run, tuned = recipe.run, recipe.finetune
    resolution, epochs = 2 * run.resolution, max(run.epochs // 2, 1)
    flags = ["--resolution", str(resolution)] if tuned.resolution > resolution else []
    flags += ["--epochs", str(epochs)] if tuned.epochs > run.epochs else []
    smaller = tuned.batch_size > run.batch_size
    return [*flags, "--batch-size", str(run.batch_size)] if smaller else flags


def gone_on_with(folder: Path, recipe: Recipe, *, again: bool = False) -> bool:
    """Whether this recipe was begun there: by the launcher that begins these ranks anew.

    Or, with `again`, by anyone.
    """
    if not ((again or restarts()) and (folder / RECIPE).exists()):
        return False
    before = Record(folder)
    if recipe.run.loader == "auto":
        recipe = Recipe.of(
            with_settings(recipe.tables(), {"run.loader": before.recipe.run.loader}, [])
        )
    same = before.recipe.toml() == recipe.toml()
    return same and (again or before.environment().get("launch") == launched())


def _placed(folder: Path, recipe: Recipe, *, named: bool = False, again: bool = False) -> Path:
    """The folder that the first rank makes of a recipe, or finds to go on with."""
    return Path(world().tell(lambda: _place(folder, recipe, named=named, again=again)))


def _place(folder: Path, recipe: Recipe, *, named: bool, again: bool) -> str:
    """A new folder, with a number where none was `named`, or the one that is gone on with."""
    taken = [folder] if named else list(takewhile(Path.exists, numbered(folder)))
    for path in reversed(taken):
        if gone_on_with(path, recipe, again=again):
            if not again:
                say(f"begun anew by torchrun: {path} goes on from its last checkpoint.")
            elif not Record(path).finished:
                say(f"{path} goes on from its last checkpoint.")
            return str(path)
    if again and named and (folder / RECIPE).exists():
        raise UsageError(
            f"{folder} was begun by another recipe: `fastidmm run` goes on with it by the flags "
            "that it was begun with; give --run another name to start a new one."
        )
    return str(begun(folder if named else free_folder(folder), recipe).folder)


def trained(folder: Path) -> dict[str, Any]:
    """Train what lies in a folder to its end; what came out."""
    record = Record(folder)
    try:
        told = train(record)
    except (UsageError, DataError, Followed):
        # What never began would be in the way.
        if not record.checkpoints.exists() and world().first:
            shutil.rmtree(record.folder)
        raise
    return summary(record) | told


def finetune(
    run: Path,
    settings: dict[str, Any],
    assignments: list[str],
    *,
    pretrained: bool = True,
    again: bool = False,
) -> dict[str, Any]:
    """Fine-tune a run's backbone, or the same one from random weights, in a stage folder.

    Above the resolution of its recipe's table [finetune] it goes on from the newest stage below.
    With `again` a stage that was begun by the very same recipe is gone on with.
    """
    parent = Record(run)
    parent.check()
    asked = with_settings({}, settings, assignments).get("run", {})
    if is_stage(run):
        raise UsageError(f"{run} is a stage of {run.parent}; fine-tune that: --run {run.parent}.")
    check_own(parent, asked)
    if any(text.strip().startswith(("finetune", "supervised.")) for text in assignments):
        raise UsageError(
            "[finetune], [finetune_high] and [supervised] are read when a run begins; here, set "
            "the stage's own keys, such as run.batch_size, optim.lr or method.mix."
        )
    store = training_rows(parent.recipe)
    same_images(parent, store.fingerprint)
    check_labels(store, parent.recipe.run.dataset)
    if pretrained and not parent.finished:
        raise UsageError(parent.unfinished)
    resolution = asked.get("resolution") or parent.recipe.finetune.resolution
    if not isinstance(resolution, int):
        raise UsageError(f"run.resolution = {resolution!r}: give pixels, such as 448.")
    start = stage_below(parent, resolution, pretrained=pretrained)
    tables = high_tables(start) if start else finetune_tables(parent, pretrained=pretrained)
    if asked.get("loader", tables["run"]["loader"]) != tables["run"]["loader"]:
        del tables["loader"]  # settings of another
    recipe = Recipe.of(with_settings(tables, settings, assignments))
    if start:
        same_images(start, store.fingerprint)
        _same_rows(start, recipe)
    if pretrained:
        check_held_out(parent, recipe)
    name = f"{'finetune-' if pretrained else SCRATCH}{recipe.run.resolution}"
    return trained(_placed(run / name, recipe, again=again))


def check_own(parent: Record, asked: dict[str, Any]) -> None:
    """Refuse keys of [run] in which a stage cannot differ from its run."""
    run, own = parent.folder, parent.recipe.run
    if asked.get("backbone") not in (None, own.backbone):
        raise UsageError(f"{run} was trained with {own.backbone}, not {asked['backbone']}.")
    if (dataset := asked.get("dataset")) not in (None, own.dataset):
        raise UsageError(
            f"{run} is of {own.dataset!r}, and so are its stages: `fastidmm finetune --dataset "
            f"{dataset}` makes a run of its own."
        )
    if (method := asked.get("method")) not in (None, "supervised"):
        raise UsageError(
            f"a stage learns the classes: `fastidmm pretrain --method {method}` begins a run."
        )


def transfer(run: Path, settings: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Fine-tune a run's backbone on another dataset, `run.dataset`, as a run of its own."""
    parent = Record(run)
    parent.check()
    if not parent.finished:
        raise UsageError(parent.unfinished)
    tables = finetune_tables(parent, pretrained=True)
    del tables["loader"], tables["run"]["loader"], tables["run"]["num_images"]  # the other's size
    tables = with_settings(tables, settings, assignments)
    words = tables["run"]["dataset"], tables["run"]["backbone"], "from", run.resolve().name
    folder = run_folder(called(*words))
    tables["run"]["init"] = os.path.relpath(parent.result, folder)
    recipe = Recipe.of(tables)
    if recipe.run.dataset == parent.recipe.run.dataset:
        same_images(parent, training_rows(recipe).fingerprint)
        check_held_out(parent, recipe)
    return trained(_placed(folder, recipe))


def _same_rows(start: Record, recipe: Recipe) -> None:
    """Refuse to judge a stage by images that the stage before it has learnt."""
    for key in ("dataset", "num_images", "holdout", "seed"):
        before, now = getattr(start.recipe.run, key), getattr(recipe.run, key)
        if before != now:
            raise UsageError(
                f"run.{key} is {now!r}, and {start.folder}, whose classifier is taken over, learnt "
                f"with {before!r}: keep that, or fine-tune at the first resolution again."
            )


def check_held_out(parent: Record, recipe: Recipe) -> None:
    """Refuse to judge a stage by images whose labels its run learnt; warn where without labels."""
    if not recipe.run.holdout:
        return
    before, whole = parent.recipe, open_store(folder_of(recipe.run.dataset), "train")
    held, learnt = split_rows(recipe, whole)[1], split_rows(before, whole)[0]
    if not (num := int(torch.isin(held, learnt).sum())):
        return
    told = f"{num} of the {len(held)} images held out were learnt by {parent.folder}"
    same = f"--holdout {before.run.holdout:g} --seed {before.run.seed}, as it had"
    remedy = f"give {same}" if before.run.holdout else "leave --holdout out"
    if find("method", before.run.method).needs_labels:
        raise UsageError(f"{told}, with their labels: {remedy}, or pretrain with this --holdout.")
    say(f"warning: {told}, without their labels: scores on them may be too high; {remedy}.")


def stage_below(parent: Record, resolution: int, *, pretrained: bool) -> Record | None:
    """The newest stage of a lower resolution, for one above [finetune]'s; None: begin anew."""
    if resolution <= parent.recipe.finetune.resolution:
        return None
    found = [Record(folder) for folder in stages(parent.folder)]
    below = [s for s in found if s.pretrained == pretrained and s.resolution < resolution]
    if not below:
        return None
    newest = below[-1]
    newest.check()
    if not newest.finished:
        raise UsageError(newest.unfinished)
    return newest


def finetune_tables(parent: Record, *, pretrained: bool) -> Tables:
    """The recipe of a first fine-tuning stage, from its run's recipe."""
    old = parent.recipe
    settings = old.finetune.model_dump(exclude_none=True)
    # What a method brings for itself is not for fine-tuning, which is the same for all.
    method = find("method", old.run.method)
    own = dict(method.settings.get("optim", {}))
    if method.lr_for_256 is not None:
        own["lr"] = method.lr_for_256 * old.run.batch_size / 256
    optim = {key: value for key, value in _optim(old).items() if own.get(key) != value}
    optim["lr"] = settings.pop("lr", optim.get("lr"))
    if pretrained:
        settings["init"] = os.path.join("..", os.path.relpath(parent.result, parent.folder))
    return _stage_tables(old, settings, optim, old.supervised)


def high_tables(start: Record) -> Tables:
    """The recipe of the stage that goes on from `start` at a higher resolution, head and all."""
    old, run = start.recipe, Record(start.folder.parent).recipe
    settings = run.finetune_high.model_dump(exclude_none=True)
    lr = settings.pop("lr", backbone(old.run.backbone).lr_high)
    optim = {**_optim(old), "lr": lr}
    settings["epochs"] = settings["epochs"] or FinetuneHighOptions().epochs
    settings["init"] = os.path.join("..", os.path.relpath(start.result, start.folder.parent))
    return _stage_tables(old, {**settings, "init_head": True}, optim, old.method)


def _optim(recipe: Recipe) -> dict[str, Any]:
    """The table [optim], but for the warm-up, which every stage has its own of."""
    return recipe.optim.model_dump(exclude={"warmup_epochs"})


def _stage_tables(
    old: Recipe, settings: dict[str, Any], optim: dict[str, Any], method: Options
) -> Tables:
    kept = old.run.model_dump(include=set(KEPT))
    return {
        "run": {**kept, **settings, "method": "supervised"},
        "optim": optim,
        "backbone": old.backbone.model_dump(),
        "method": method.model_dump(),
        "loader": old.loader.model_dump(),
    }


def summary(record: Record) -> dict[str, Any]:
    """What a finished stage says of itself; a fine-tuned one with its test accuracy."""
    recipe, last = record.recipe, (record.metrics() or [{}])[-1]
    found = {
        "run": str(record.folder),
        "dataset": recipe.run.dataset,
        "backbone": recipe.run.backbone,
        "method": recipe.run.method,
        "epochs": recipe.run.epochs,
        "steps": record.steps,
        "seconds": round(record.seconds, 1),
        "checkpoint": str(record.result),
        **{key: last[key] for key in (*SHOWN, *LABEL_FREE) if key in last},
    }
    if recipe.run.method != "supervised":
        seen = [
            (line["epoch"], line["knn_top1"]) for line in record.metrics() if "knn_top1" in line
        ]
        found |= {"knn_top1_rises": per_100} if (per_100 := rising(seen)) else {}
        share = told_apart(record.metrics())
        found |= {} if share is None else {"told_apart": share}
    for split in ("test", "holdout"):
        # The last line may be one that damage took.
        if f"{split}_num" in last and (top := best(record, split)):
            num = last[f"{split}_num"]
            found[f"{split}_top1"] = Score(round(last[f"{split}_top1"] * num), num).as_dict()
            found[f"best_{split}_top1"] = top
    return found


def told_apart(lines: list[dict[str, Any]]) -> float | None:
    """The share of crops recognised as their own image, over the latest lines; None: not asked."""
    told = [line["instance_top1"] for line in lines if line.get("instance_top1") is not None]
    latest = told[-LATEST:]
    return sum(latest) / len(latest) if latest else None


def resume(run: Path) -> list[dict[str, Any]]:
    """Go on with whatever of a run is not finished: itself, then its stages."""
    records = [Record(folder) for folder in (run, *stages(run))]
    told = [train(record) for record in records]
    return [summary(record) | of_it for record, of_it in zip(records, told, strict=True)]
