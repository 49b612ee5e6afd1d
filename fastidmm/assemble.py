"""What a recipe becomes: the store, the method, the loader and the optimizer, on the device."""

from dataclasses import dataclass, field

import torch

from fastidmm import checkpoint
from fastidmm.backbones.build import build_encoder, load_encoder
from fastidmm.batch import Loader, Method
from fastidmm.chance import Counters
from fastidmm.errors import DataError, UsageError
from fastidmm.machine import dtype_of, set_up
from fastidmm.optim import Schedule, adamw, lr_schedule
from fastidmm.progress import say
from fastidmm.recipe import Recipe
from fastidmm.record import Record, encoder_weights
from fastidmm.registry import find
from fastidmm.store import Store, folder_of, open_store, stratified

CROPS_PER_CPU_PASS = 128  # more at once leave the cache, and are slower


@dataclass(slots=True)
class State:
    """What a checkpoint holds besides tensors."""

    step: int = 0  # steps made
    attempt: int = 0  # grows when a run rolls back, so that it does not meet the same pictures
    strikes: int = 0  # steps skipped close to one another
    last_strike: int = 0
    micro_batches: int = 1
    skipped: float = 0.0  # steps skipped since the last metric line
    seconds: float = 0.0  # spent training


@dataclass(slots=True)
class Parts:
    """What a recipe becomes: the loop's tools."""

    recipe: Recipe
    record: Record
    store: Store
    method: Method
    loader: Loader
    counters: Counters
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    dtype: torch.dtype
    state: State = field(default_factory=State)


def training_rows(recipe: Recipe) -> Store:
    """The training split a recipe asks for, memory-mapped."""
    store = open_store(folder_of(recipe.run.dataset), "train")
    num = recipe.run.num_images
    if num > len(store):
        raise UsageError(f"run.num_images is {num}, and the store has {len(store)} images.")
    store = store.select(stratified(store.label, num, recipe.run.seed)) if num else store
    if len(store) < 2:
        raise DataError(f"{recipe.run.dataset!r} has {len(store)} training image; 2 are needed.")
    if find("method", recipe.run.method).needs_labels:
        check_labels(store, recipe.run.dataset)
    return store


def check_labels(store: Store, name: str) -> None:
    """Refuse images that no classifier can be learnt from."""
    if not store.labelled:
        raise DataError(
            f"the images of {name!r} have no labels: fine-tuning and evaluation need a folder per "
            "class (CLASS/*.jpg); prepare them so."
        )
    if store.num_classes < 2:
        raise DataError(f"{name!r} has one class; a classifier needs at least 2.")


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
        )
    return method


def assemble(record: Record, split: Store | None = None) -> Parts:
    """Everything a recipe names, on the device, with the first weights of its seed.

    `split` stands in for the prepared training split: benchmarks make their own.
    """
    recipe, run = record.recipe, record.recipe.run
    device = set_up(run.device, exact=run.exact)
    dtype = dtype_of(run.precision, device)
    store = (training_rows(recipe) if split is None else split).to(device)
    if store.fingerprint != record.environment()["train_fingerprint"]:
        raise DataError(
            f"{run.dataset!r} was prepared anew since {record.folder} began; start a new run."
        )
    counters = Counters(run.seed)
    method = build_method(recipe, store, counters)
    if run.init and checkpoint.newest(record.checkpoints) is None:
        source = record.folder / run.init
        loaded = load_encoder(method.backbone, encoder_weights(source), source=str(source))
        say(f"{loaded}, head new: from {source.resolve().parent.parent}")
    method.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader: Loader = find("loader", run.loader)(
        store, method, counters, batch_size=run.batch_size, dtype=dtype
    )
    schedule = lr_schedule(recipe.optim, epochs=run.epochs, steps_per_epoch=loader.steps_per_epoch)
    optimizer = adamw(method, recipe.optim, device)
    parts = Parts(recipe, record, store, method, loader, counters, optimizer, schedule, dtype)
    if run.micro_batches > 1 and not method.can_be_cut():
        raise UsageError(
            f"run.micro_batches = {run.micro_batches}: with {run.method} on {run.backbone} a "
            "crop's loss depends on the others' (BatchNorm does that, too); leave it out."
        )
    parts.state.micro_batches = run.micro_batches or _first_guess(parts, device)
    return parts


def _first_guess(parts: Parts, device: torch.device) -> int:
    """Micro-batches to begin with: on a GPU one, which grows when memory is short."""
    if device.type == "cuda" or not parts.method.can_be_cut():
        return 1
    crops = sum(g.count for g in parts.method.views)
    images = min(parts.recipe.run.batch_size, len(parts.store))
    return -(-images * crops // CROPS_PER_CPU_PASS)


@dataclass(frozen=True, slots=True)
class Cadence:
    """How often what happens rarely happens, in steps."""

    log: int
    knn: int
    checkpoint: int

    @classmethod
    def of(cls, parts: Parts) -> "Cadence":
        """The recipe's epochs as steps; unless told otherwise, about ten log lines an epoch."""
        run, epoch = parts.recipe.run, parts.loader.steps_per_epoch
        return cls(
            log=run.log_every or (1 if epoch < 10 else epoch // 10),
            knn=run.knn_every * epoch,
            checkpoint=run.checkpoint_every * epoch,
        )

    @staticmethod
    def due(step: int, every: int) -> bool:
        """Whether it is time."""
        return step % every == 0
