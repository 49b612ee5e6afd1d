"""Make a table of the paper again: run what is missing, go on with what was cut, tell the rest."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastidmm.backbones.build import backbone as backbone_named
from fastidmm.errors import FastidmmError, Interrupted, UsageError
from fastidmm.evaluate import Score
from fastidmm.machine import device_of
from fastidmm.paper.budget import FEWEST_IMAGES, SPENT, Cost, fitting, measured, seconds_of
from fastidmm.paper.protocol import WHOLE, Cut, Run, Work, stages, work
from fastidmm.paper.published import TIMM, Cell, chosen, unpublished
from fastidmm.paper.sheet import Row, Sheet
from fastidmm.places import folder_of, prepared, read_json
from fastidmm.progress import say
from fastidmm.recipe import Recipe
from fastidmm.record import RECIPE, Record, run_folder
from fastidmm.registry import METHODS
from fastidmm.run import prepare_demo
from fastidmm.stages import finetune, pretrain, summary
from fastidmm.train import train

CPU_BACKBONE = "vit_micro"
CPU_SCALE = 2 / 7  # 32 px for 112, 64 for 224, 128 for 448


@dataclass(slots=True)
class Table:
    """The cells that were asked for, how they are cut, and what went wrong so far."""

    name: str
    table: str
    cells: list[Cell]
    seeds: int
    images: dict[str, int]  # there are to train on, by dataset
    cut: Cut = WHOLE
    notes: list[str] = field(default_factory=list)
    problems: dict[Cell, FastidmmError] = field(default_factory=dict)

    def work(self, cell: Cell, seed: int) -> Work:
        """The runs behind a cell and a seed."""
        return work(cell, seed, self.cut, self.images)

    def sheet(self) -> Sheet:
        """What is measured so far, from what lies in ./runs."""
        cut = {**asdict(self.cut), "seeds": self.seeds} if self.cut.suffix else None
        return Sheet(self.name, self.table, [self._row(c) for c in self.cells], self.notes, cut)

    def _row(self, cell: Cell) -> Row:
        works = [self.work(cell, seed) for seed in range(self.seeds)]
        records = [scored(each) for each in works]
        problem = self.problems.get(cell)
        return Row(
            cell,
            runs=[each.run.name for each in works],
            scores=[score_of(record) if record else None for record in records],
            seconds=[seconds_spent(each) for each in works],
            problem=str(problem) if problem else lack(cell),
            cut=self.cut,
        )


def reproduce(
    table: str,
    *,
    dataset: str | None,
    backbone: str | None,
    seeds: int,
    budget: str | None,
    dry_run: bool,
) -> tuple[Sheet, int]:
    """Bring what a table lacks, and what came of it; the exit status of the first failure."""
    cells = chosen(table, dataset, backbone)
    name = "-".join(filter(None, ("reproduce", table, dataset, backbone, budget))).replace(":", "-")
    if dataset == "demo" and not dry_run:
        prepare_demo()
    images = num_images({name for cell in cells for name in (cell.dataset, cell.source)})
    asked = Table(name, table, cells, seeds, images, notes=_first_words(budget))
    if budget:
        seconds_of(budget)
        if not cut_short(asked, budget, measure=not dry_run):
            return asked.sheet(), 0
    if dry_run:
        return asked.sheet(), 0
    ready = [cell for cell in asked.cells if not lack(cell)]
    for line in asked.notes:
        say(line)
    try:
        for seed in range(seeds):  # all arms by one seed first: they are compared soonest
            for cell in ready:
                try:
                    bring(asked.work(cell, seed))
                except Interrupted:
                    raise
                except FastidmmError as problem:
                    say(f"{cell.arm} on {cell.dataset}: {problem}")
                    asked.problems.setdefault(cell, problem)
                asked.sheet().write()
    except Interrupted:
        asked.sheet().write()
        raise Interrupted("stopped; the same command goes on.") from None
    sheet = asked.sheet()
    sheet.write()
    return sheet, next((problem.status for problem in asked.problems.values()), 0)


def _first_words(budget: str | None) -> list[str]:
    if budget or device_of("auto").type == "cuda":
        return []
    return ["This machine has no GPU: the whole protocol takes weeks here; see --budget."]


# --- what there is, and what is lacking ---------------------------------------------------------


def num_images(datasets: set[str]) -> dict[str, int]:
    """How many images each of these has to train on, of those that are prepared."""
    known = datasets & set(prepared())
    return {name: read_json(folder_of(name))["splits"]["train"]["num_images"] for name in known}


def lack(cell: Cell) -> str:
    """What stands in the way of a cell; "": nothing."""
    if cell.table == "T4":
        return "a recipe only: configs/imagenet.toml"
    if cell.method not in METHODS:
        return f"not built: {cell.method}"
    try:
        known = backbone_named(cell.backbone)
    except UsageError:
        return f"not built: {cell.backbone}"
    if cell.arm == TIMM and not known.weights:
        return f"timm has no weights of {cell.backbone}"
    missing = [n for n in dict.fromkeys((cell.source, cell.dataset)) if n not in prepared()]
    return f"fastidmm prepare --dataset {missing[0]}" if missing else ""


def scored(work: Work) -> Record | None:
    """The record whose classifier is the cell's, where it is finished."""
    folder = run_folder(work.run.name)
    if work.resolutions:
        folder = folder / f"finetune-{work.resolutions[-1]}"
    return _finished(folder)


def _finished(folder: Path) -> Record | None:
    record = Record(folder) if (folder / RECIPE).exists() else None
    return record if record and record.finished else None


def score_of(record: Record) -> Score | None:
    """Top-1 on the test images after the last epoch."""
    told = summary(record).get("test_top1")
    return Score(told["correct"], told["num"]) if told else None


def seconds_spent(work: Work) -> float | None:
    """Training that lies in a finished cell's own run; None before."""
    if scored(work) is None:
        return None
    folder = run_folder(work.run.name)
    folders = [folder, *(folder / f"finetune-{side}" for side in work.resolutions)]
    return sum(float(Record(each).state.get("seconds", 0.0)) for each in folders)


# --- bringing it --------------------------------------------------------------------------------


def bring(work: Work) -> None:
    """Train what a cell lacks, from where it stands."""
    run = work.run
    if work.source is not None:
        start = begun(work.source)
        place = os.path.relpath(start.result, run_folder(run.name))
        run = replace(run, tables={**run.tables, "run": {**run.tables["run"], "init": place}})
    begun(run)
    folder = run_folder(run.name)
    for side in work.resolutions:
        stage = folder / f"finetune-{side}"
        if (stage / RECIPE).exists():
            _to_its_end(Record(stage))
        else:
            finetune(folder, {"run.resolution": side}, [])


def begun(run: Run) -> Record:
    """A run, finished: begun anew, gone on with, or as it lies there."""
    folder = run_folder(run.name)
    if not (folder / RECIPE).exists():
        pretrain(Recipe.of(run.tables), run.name)
        return Record(folder)
    record = Record(folder)
    # What depends on the machine is settled when a run begins.
    if _bare(record.recipe) != _bare(Recipe.of(run.tables)):
        raise UsageError(
            f"{folder} was made by another recipe than this table's: move it away, and it is made."
        )
    _to_its_end(record)
    return record


def _to_its_end(record: Record) -> None:
    if not record.finished:
        train(record)


def _bare(recipe: Recipe) -> dict[str, Any]:
    tables = recipe.tables()
    del tables["loader"], tables["run"]["loader"]
    return tables


# --- by a budget --------------------------------------------------------------------------------


def cut_short(asked: Table, budget: str, *, measure: bool) -> bool:
    """Cut a table to its budget: as it was begun, or else as steps on this machine suggest.

    False where that was not to be measured.
    """
    cpu = device_of("auto").type == "cpu"
    first = Cut(suffix=budget, scale=CPU_SCALE if cpu else 1.0)
    if cpu:
        asked.cells = unpublished(asked.cells, backbone=CPU_BACKBONE)
    asked.notes = [f"Cut to --budget {budget}: these numbers are not by the paper's protocol."]
    path = Path("runs") / f"{asked.name}.json"
    before = json.loads(path.read_text())["cut"] if path.exists() else None
    if before:
        if before.pop("seeds") != asked.seeds:
            raise UsageError(f"{path} was begun with other --seeds: repeat them, or move it away.")
        asked.cut = Cut(**before)
    elif measure and (costs := _costs(asked, first)):
        share, num = fitting(costs, SPENT * seconds_of(budget))
        asked.cut = replace(first, share=share, num_images=num)
        total = sum(cost.seconds(share, num) for cost in costs)
        asked.notes.append(f"Forecast for all of it: {total / 60:.1f} minutes.")
    else:
        asked.cut = first
        asked.notes.append("What it comes to is measured when it begins.")
        return False
    cut, images = asked.cut, asked.cut.num_images
    asked.notes.append(
        f"Every stage has {cut.share:.2%} of its epochs (at least one) and at most {images} images"
        + (f"; crops {cut.side(112)}, {cut.side(224)} and {cut.side(448)} px." if cpu else ".")
    )
    asked.sheet().write()
    return True


def _costs(asked: Table, cut: Cut) -> list[Cost]:
    """Every stage that is to be run, each measured once; those of all seeds."""
    known: dict[str, Cost] = {}
    costs: dict[str, Cost] = {}
    for cell in (c for c in asked.cells if not lack(c)):
        trial = replace(cut, num_images=FEWEST_IMAGES)
        for name, tables, epochs in stages(cell, trial, asked.images):
            run, kind = tables["run"], json.dumps(tables)
            if name in costs:
                continue
            if kind not in known:
                say(f"measuring {run['method']} at {run['resolution']} px on {run['dataset']}")
                known[kind] = measured(tables, epochs=epochs, images=asked.images[run["dataset"]])
            costs[name] = replace(known[kind], epochs=epochs)
    return list(costs.values()) * asked.seeds
