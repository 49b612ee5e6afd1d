"""From a cell of the paper's tables to the runs that measure it, and their recipes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastidmm.errors import UsageError
from fastidmm.paper.published import ABLATION, TIMM, Cell
from fastidmm.places import NAME
from fastidmm.recipe import Tables, read_tables, with_settings

# What the ablation's rungs change in configs/ablation.toml, each in addition to those before it.
RUNGS: dict[str, dict[str, Any]] = {
    "insdis": {},
    "smoothing": {"method.smoothing": 0.1},
    "small": {"run.resolution": 112},
    "multicrop": {"method.num_small": 4},
    "cutmix": {"method.cutmix": True},
}
STEPS_AN_EPOCH = 8  # of Flowers' 2,040 images at the paper's batch
SMALLEST_BATCH = 8
PATCH = 8  # px, that the side of a crop is a multiple of


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of the paper's protocol is done: the same share of every stage, for all arms."""

    share: float = 1.0  # of the epochs
    num_images: int = 0  # of every training split, at most; 0: all
    scale: float = 1.0  # of the crops' sides
    suffix: str = ""  # of the runs' names: the budget that it was made for

    def epochs(self, published: int) -> int:
        """Epochs of a stage that has so many in the paper."""
        return max(1, round(self.share * published))

    def side(self, published: int) -> int:
        """Side of a crop that has so many px in the paper."""
        return (
            published if self.scale == 1 else max(1, round(self.scale * published / PATCH)) * PATCH
        )


WHOLE = Cut()


@dataclass(frozen=True, slots=True)
class Run:
    """A run by its name in ./runs, with the recipe's tables that it begins with."""

    name: str
    tables: Tables


@dataclass(frozen=True, slots=True)
class Work:
    """What measures a cell once: a run, what it begins with, and the stages after it."""

    run: Run
    source: Run | None = None  # the run whose backbone it starts from
    resolutions: tuple[int, ...] = ()  # of the fine-tuning stages inside it; the last is scored


def work(cell: Cell, seed: int, cut: Cut, images: dict[str, int]) -> Work:
    """The runs behind a cell; `images` says how many each dataset has to train on, where known."""
    if cell.arm == ABLATION[-1] and not cut.suffix:  # all of it is T1's cell: trained once for both
        cell = replace(cell, table="T1", arm="idmm")
    if not cell.pretrained:
        return Work(_run(cell, cell.dataset, seed, cut, images, _tuning(cell)))
    pretraining = _run(cell, cell.source, seed, cut, images, _pretraining(cell))
    if cell.source != cell.dataset:
        tuning = _run(cell, cell.dataset, seed, cut, images, _tuning(cell))
        return Work(tuning, source=pretraining)
    sides = dict.fromkeys((224, cell.resolution))
    return Work(pretraining, resolutions=tuple(cut.side(side) for side in sides))


def stages(cell: Cell, cut: Cut, images: dict[str, int]) -> Iterator[tuple[str, Tables, int]]:
    """Every stage of a cell: its folder, a recipe that costs as much, its epochs in the paper."""
    begins = work(cell, 0, cut, images)
    if cell.pretrained:
        run = begins.source or begins.run
        yield run.name, run.tables, _pretraining(cell)["run"]["epochs"]
    tables = _tuning(cell)
    tables["run"].pop("init", None)  # weights cost nothing
    for side in dict.fromkeys((224, cell.resolution)):
        if side != 224:
            high = read_tables("paper")["finetune_high"]
            tables = {**tables, "run": {**tables["run"], **high}}
        run = _run(cell, cell.dataset, 0, cut, images, tables)
        yield f"{run.name}/{side}", run.tables, tables["run"]["epochs"]


def _pretraining(cell: Cell) -> Tables:
    """The recipe of a pretraining at the paper's length, and of the stages after it."""
    if cell.arm in ABLATION:
        changes: dict[str, Any] = {}
        for rung in ABLATION[: ABLATION.index(cell.arm) + 1]:
            changes |= RUNGS[rung]
        return with_settings(read_tables("ablation"), changes, [])
    tables = read_tables("paper")
    if cell.source == cell.dataset:  # or else many that are tuned otherwise go on from it
        tables["finetune"]["epochs"] = cell.epochs
    if cell.method != "idmm":  # views, rate, decay and batch are the method's own
        del tables["method"], tables["optim"], tables["run"]["batch_size"]
        tables["run"]["method"] = cell.method
    return tables


def _tuning(cell: Cell) -> Tables:
    """The recipe of fine-tuning as a run of its own: the same as a stage's."""
    if cell.table == "T4":
        tables = read_tables("imagenet")
        tables["run"]["epochs"] = cell.epochs
    else:
        paper = read_tables("paper")
        tables = {key: paper[key] for key in ("optim", "backbone")}
        tables["run"] = {**paper["finetune"], "method": "supervised", "epochs": cell.epochs}
        tables["method"] = paper["supervised"]
    if cell.arm == TIMM:
        tables["run"]["init"] = TIMM
    return tables


def _run(
    cell: Cell, dataset: str, seed: int, cut: Cut, images: dict[str, int], tables: Tables
) -> Run:
    arm = cell.arm if cell.table != "T4" else f"{cell.arm}{cell.epochs}"
    if dataset != cell.dataset:  # the same for all that go on from it
        arm = cell.arm
    words = (cell.table, dataset, arm, cell.backbone, f"s{seed}", cut.suffix)
    own = {"dataset": dataset, "backbone": cell.backbone, "seed": seed}
    shortened = _shortened({**tables, "run": {**tables["run"], **own}}, cut, images.get(dataset, 0))
    name = "-".join(filter(None, words)).replace(":", "-")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"a run would be called {name}, longer than 64 letters: prepare {dataset!r} again by a "
            "shorter --name."
        )
    return Run(name, shortened)


def _shortened(tables: Tables, cut: Cut, available: int) -> Tables:
    """Tables with every stage cut by the same share.

    With fewer images the batch shrinks, so that an epoch has no fewer steps than Flowers' have.
    """
    if not cut.suffix:
        return tables
    found = {name: dict(table) for name, table in tables.items()}
    for name in ("run", "finetune", "finetune_high"):
        table = found.get(name, {})
        if "epochs" in table:
            table["epochs"] = cut.epochs(table["epochs"]) if table["epochs"] else 0
        if "resolution" in table:
            table["resolution"] = cut.side(table["resolution"])
    run, fewer = found["run"], cut.num_images if cut.num_images < available else 0
    run["num_images"] = fewer
    # Looks and checkpoints would take a short run longer than its steps do.
    run["knn_every"] = run["score_every"] = run["epochs"]
    run["checkpoint_every"] = run["epochs"]  # a signal writes one, too
    num = fewer or available
    if num <= (STEPS_AN_EPOCH - 1) * 256:
        batch = max(SMALLEST_BATCH, num // STEPS_AN_EPOCH)
        run["batch_size"] = min(run.get("batch_size", 256), batch)
        for name, largest in (("finetune", 256), ("finetune_high", 128)):
            if name in found:
                found[name]["batch_size"] = min(largest, batch)
    return found
