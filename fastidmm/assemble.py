"""What a recipe becomes: the store, the method, the loader and the optimizer, on the device."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastidmm import checkpoint
from fastidmm.backbones.build import Encoder, backbone, build_encoder, load_weights
from fastidmm.batch import Method
from fastidmm.chance import Counters, Use
from fastidmm.errors import DataError, OutOfMemoryError, UsageError
from fastidmm.folders import PUBLISHED, start_of
from fastidmm.loaders.memory import within_reach
from fastidmm.loaders.planned import Planned
from fastidmm.machine import available_memory, dtype_of, peak_memory, set_up
from fastidmm.norms import check_norms, share_norms
from fastidmm.optim import Scaler, Schedule, lr_schedule, optimizer_over
from fastidmm.places import readable
from fastidmm.preparing.weights import cached_weights
from fastidmm.progress import say
from fastidmm.ranks import world
from fastidmm.recipe import Recipe
from fastidmm.record import Record, encoder_weights
from fastidmm.registry import find
from fastidmm.store import Store, folder_of, has_split, open_store, stratified

Made = TypeVar("Made")
CROPS_PER_CPU_PASS = 128  # more at once leave the cache, and are slower


@dataclass(slots=True)
class State:
    """What a checkpoint holds besides tensors."""

    step: int = 0  # steps made
    attempt: int = 0  # grows when a run rolls back, so that it does not meet the same pictures
    strikes: int = 0  # steps skipped close to one another
    last_strike: int = 0
    micro_batches: int = 1
    ranks: int = 1  # that made the steps before the checkpoint
    skipped: float = 0.0  # steps skipped since the last metric line
    seconds: float = 0.0  # spent training
    best: float = 0.0  # score on the held-out images, and the step it was reached at
    best_step: int = 0
    ended: bool = False  # before the last step, since the score rose no longer
    # A metric line that waits for its evaluation, which a signal left: made good before a step.
    line: dict[str, Any] = field(default_factory=dict)


def nothing() -> bool:
    """No memory to give back."""
    return False


@dataclass(slots=True)
class Parts:
    """What a recipe becomes: the loop's tools."""

    recipe: Recipe
    record: Record
    store: Store
    method: Method
    loader: Planned
    counters: Counters
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    dtype: torch.dtype
    judge: Store | None  # the images that a classifier is scored on while it learns
    scaler: Scaler | None  # of fp16
    state: State = field(default_factory=State)
    # Gives memory back that can be had again, where a step runs short of it; whether there was any.
    release: Callable[[], bool] = nothing

    def with_room(self, work: Callable[[], Made]) -> Made:
        """What the work gives; where memory is short, once more without what can be given back."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.release():
                raise
        return work()


def training_rows(recipe: Recipe) -> Store:
    """The training images a recipe asks for, memory-mapped; those with labels if it needs them."""
    store = open_store(folder_of(recipe.run.dataset), "train")
    if recipe.run.holdout or recipe.run.num_images:
        store = store.select(split_rows(recipe, store)[0])
    if len(store) < 2:
        raise DataError(f"{recipe.run.dataset!r} has {len(store)} training image; 2 are needed.")
    if find("method", recipe.run.method).needs_labels:
        check_labels(store, recipe.run.dataset)
        store = store.with_labels()
    return store


def same_images(record: Record, fingerprint: str) -> None:
    """Refuse images prepared anew since a run began: those it learnt may be test images now.

    `fingerprint`: of the training split as it lies there.
    """
    if fingerprint != record.environment()["train_fingerprint"]:
        raise DataError(
            f"{record.recipe.run.dataset!r} was prepared anew since {record.folder} began: prepare "
            "it as it was, or start a new run."
        )


def split_rows(recipe: Recipe, store: Store) -> tuple[Tensor, Tensor]:
    """Rows of the training split to learn from, and those held out: int64, each in its order.

    Both are functions of the labels and the run's seed; every class is held out in its share, and
    of images without labels none where others have them: nothing can be judged by those.
    """
    run, labels = recipe.run, store.label
    learnt = torch.ones(len(store), dtype=torch.bool)
    held = torch.zeros(0, dtype=torch.int64)
    if run.holdout:
        fit = (labels >= 0) if store.labelled else learnt
        judges = fit.nonzero()[:, 0]
        num = round(run.holdout * len(judges))
        # Every class keeps an image to be learnt from.
        held = judges[stratified(labels[judges], num, run.seed, Use.HOLDOUT, spare=1)]
        learnt[held] = False
        if not len(held):
            raise UsageError(
                f"--holdout {run.holdout:g} would hold none of {len(judges)} images out: raise it."
            )
    rows = learnt.nonzero()[:, 0]
    if run.num_images > len(rows):
        raise UsageError(
            f"run.num_images is {run.num_images}, and the store has {len(rows)} images: lower it, "
            "or take all by --set run.num_images=0."
        )
    if run.num_images:
        rows = rows[stratified(labels[rows], run.num_images, run.seed)]
    return rows, held


def judging_rows(recipe: Recipe, store: Store) -> Store | None:
    """Images to score a classifier on while it learns: held-out ones, else the test split.

    Where the device of `store`, the training rows, reads them.
    """
    run = recipe.run
    if run.holdout:
        whole = open_store(folder_of(run.dataset), "train")
        return within_reach(whole.select(split_rows(recipe, whole)[1]), store.device)
    if has_split(run.dataset, "test"):
        return within_reach(open_store(folder_of(run.dataset), "test"), store.device)
    return None


def check_labels(store: Store, name: str) -> None:
    """Refuse images that no classifier can be learnt from."""
    if not store.num_classes:
        raise DataError(
            f"the images of {name!r} have no labels: fine-tuning and evaluation need a folder per "
            "class (CLASS/*.jpg); prepare them so."
        )
    if store.num_classes < 2:
        raise DataError(f"{name!r} has one class; a classifier needs at least 2.")
    if (known := store.num_labelled) < 2:
        raise DataError(
            f"of the {len(store):,} images of {name!r} to learn from {known or 'none'} has a "
            "label, and fine-tuning and evaluation need 2: raise run.num_images, or label more."
        )


def build_method(recipe: Recipe, store: Store, counters: Counters) -> Method:
    """The method a recipe names and its backbone, on the CPU, with its seed's first weights."""
    run = recipe.run
    encoder = build_encoder(
        run.backbone, recipe.backbone, resolution=run.resolution, counters=counters
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)
        method: Method = find("method", run.method)(
            encoder,
            recipe.method,
            resolution=run.resolution,
            num_rows=len(store),
            num_classes=store.num_classes,
            batch_size=run.batch_size,
        )
    return method


def check_memory(recipe: Recipe, method: Method, num_images: int, device: torch.device) -> None:
    """Refuse, on a CPU, a batch whose views alone its memory cannot hold: the system would kill it.

    There are two batches: the next one is made while a step learns from the last.
    """
    if device.type != "cpu":
        return
    run = recipe.run
    images = min(run.batch_size, num_images) // world().size
    numbers = sum(group.count * 3 * group.size**2 for group in method.views)
    needed = 2 * images * numbers * dtype_of(run.precision, device).itemsize
    # What an earlier stage had is not given back to the system, and is there to be used again.
    if needed > (free := available_memory() + peak_memory()):
        raise OutOfMemoryError(
            f"two batches of views, as many as a CPU has at once, take {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB of memory are free: lower --batch-size, {run.batch_size}, or "
            f"--resolution, {run.resolution}."
        )


def assemble(record: Record, split: Store | None = None) -> Parts:
    """Everything a recipe names, on the device, with the first weights of its seed.

    `split` stands in for the prepared training split: benchmarks make their own.
    """
    recipe, run = record.recipe, record.recipe.run
    device = set_up(run.device, exact=run.exact)
    dtype = dtype_of(run.precision, device)
    store = training_rows(recipe) if split is None else split
    same_images(record, store.fingerprint)
    counters = Counters(run.seed)
    method = build_method(recipe, store, counters)
    if checkpoint.newest(record.checkpoints) is None:
        check_norms(method, len(store), run.batch_size)
        if run.init:
            say(initialise(method, record.folder, recipe))
    share_norms(method.backbone, len(store), run.batch_size, method.cutmix_groups)
    method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Other kinds of CPU begin otherwise.
    world().same(t for name, t in method.state_dict().items() if name not in method.shards)
    if run.compile:
        if run.exact:
            raise UsageError(
                "run.compile and --exact exclude each other: what is compiled rounds otherwise on "
                "other machines and versions; leave one of them out."
            )
        assert isinstance(method.backbone, Encoder)
        method.backbone.compile_training()
    loader: Planned = find("loader", run.loader)(
        store,
        method,
        counters,
        batch_size=run.batch_size,
        dtype=dtype,
        device=device,
        options=recipe.loader,
    )
    store = loader.store.tables_to(device)  # pixels where the loader wants them
    method.steps_per_epoch = loader.steps_per_epoch
    method.num_steps = run.epochs * loader.steps_per_epoch
    schedule = lr_schedule(recipe.optim, epochs=run.epochs, steps_per_epoch=loader.steps_per_epoch)
    optimizer = optimizer_over(method, recipe.optim, device, run.optimizer)
    # A method may need labels and still learn no classes.
    judged = split is None and method.classifier() is not None and world().first
    judge = judging_rows(recipe, store) if judged else None
    scaler = Scaler(device) if dtype == torch.float16 else None
    parts = Parts(
        recipe, record, store, method, loader, counters, optimizer, schedule, dtype, judge, scaler
    )
    if run.micro_batches > 1 and not method.can_be_cut():
        raise UsageError(
            f"run.micro_batches = {run.micro_batches}: with {run.method} on {run.backbone} a "
            "crop's loss depends on the others' (BatchNorm does that, too); leave it out."
        )
    parts.state.ranks = world().size
    parts.state.micro_batches = run.micro_batches or _first_guess(parts, device)
    return parts


def initialise(method: Method, folder: Path, recipe: Recipe) -> str:
    """Load what a recipe's `run.init` names into a method; what was loaded, in words."""
    if recipe.run.init == PUBLISHED:
        loaded = _load_published(method, recipe.run.backbone)
        method.begin()
        return loaded
    source = start_of(folder, recipe.run.init)
    if source is None:
        return "random weights"
    readable(source, "run.init")
    if not (source / checkpoint.STATE).is_file():
        why = "is no checkpoint" if source.exists() else "is not there"
        name = _meant(source, recipe.run.init, folder) or "a checkpoint's folder"
        raise UsageError(
            f"run.init names {source}, which {why}: name {name} as seen from {folder}, or leave it "
            "out."
        )
    if recipe.run.init_head:
        (state,), _ = checkpoint.load(source, checkpoint.MODEL)
        loaded = load_weights(method, state, source=str(source)) + ", head included"
    else:
        loaded = load_weights(method.backbone, encoder_weights(source), source=str(source))
        loaded += ", head new"
        method.begin()
    return f"{loaded}: from {source.parent.parent}"


def _meant(source: Path, init: str, folder: Path) -> str:
    """A checkpoint as seen from `folder` that another reading of `init` gives; "" without any.

    A run's folder instead of its checkpoint's, a run's name, or a path as seen from here.
    """
    for place in (source, Path(init), Path("runs") / init):
        kept = [place, *reversed(checkpoint.found(place / "checkpoints"))]
        for path in kept:
            if (path / checkpoint.STATE).is_file():
                return os.path.relpath(path, folder)
    return ""


def _load_published(method: Method, name: str) -> str:
    """Load the weights that timm has for a backbone; what was loaded, in words."""
    published = backbone(name).weights
    if not published:
        raise UsageError(
            f"timm has no weights of {name}: name another backbone, or leave run.init out."
        )
    state = {f"model.{n}": tensor for n, tensor in cached_weights(published).items()}
    return load_weights(method.backbone, state, source=f"timm's {published}") + ", head new: timm's"


def _first_guess(parts: Parts, device: torch.device) -> int:
    """Micro-batches to begin with: on a GPU one, which grows when memory is short."""
    cheap = parts.method.rows_independent and parts.method.can_be_cut()
    if device.type == "cuda" or not cheap:
        return 1
    crops = sum(g.count for g in parts.method.views)
    images = min(parts.recipe.run.batch_size, len(parts.store))
    return -(-images * crops // (CROPS_PER_CPU_PASS * world().size))


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often what happens rarely happens, in steps."""

    log: int
    knn: int
    score: int
    checkpoint: int

    @classmethod
    def of(cls, parts: Parts) -> "Cadence":
        """The recipe's epochs as steps; unless told otherwise, about ten log lines an epoch."""
        run, epoch = parts.recipe.run, parts.loader.steps_per_epoch
        return cls(
            log=run.log_every or (1 if epoch < 10 else epoch // 10),
            knn=run.knn_every * epoch,
            score=run.score_every * epoch,
            checkpoint=run.checkpoint_every * epoch,
        )

    @staticmethod
    def due(step: int, every: int) -> bool:
        """Whether it is time."""
        return step % every == 0
