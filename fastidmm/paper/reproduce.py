"""Make a table of the paper again: run what is missing, go on with what was cut, tell the rest."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fastidmm.backbones.build import backbone as backbone_named
from fastidmm.backbones.torchvision_ops import make_torchvision_importable
from fastidmm.errors import DataError, FastidmmError, Interrupted, UsageError, did_you_mean
from fastidmm.evaluate import Score
from fastidmm.folders import RECIPE, run_folder
from fastidmm.machine import device_of
from fastidmm.paper.budget import FEWEST_IMAGES, SPENT, Cost, fitting, measured, seconds_of
from fastidmm.paper.protocol import WHOLE, Cut, Run, Work, stages, work
from fastidmm.paper.published import TABLES, TIMM, Cell, cells, chosen, unpublished
from fastidmm.paper.sheet import Row, Sheet
from fastidmm.places import folder_of, prepared, read_json
from fastidmm.progress import say
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.registry import DATASETS, METHODS
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
    if budget:
        seconds_of(budget)
    check_names(dataset, backbone)
    wanted = chosen(table, dataset, backbone)
    name = "-".join(filter(None, ("reproduce", table, dataset, backbone, budget))).replace(":", "-")
    if dataset == "demo" and not dry_run:
        prepare_demo()
    images = num_images({name for cell in wanted for name in (cell.dataset, cell.source)})
    asked = Table(name, table, wanted, seeds, images, notes=_first_words(budget))
    if budget:
        cut_short(asked, budget, measure=not dry_run)
    if not dry_run:
        for line in asked.notes:
            say(line)
        bring_all(asked)
    return asked.sheet(), next((problem.status for problem in asked.problems.values()), 0)


def check_names(dataset: str | None, backbone: str | None) -> None:
    """Refuse names that are neither the paper's nor known here."""
    known = {*DATASETS, *prepared()}
    if dataset is not None and dataset not in known:
        raise UsageError(f"unknown dataset {dataset!r}: {did_you_mean(dataset, list(known))}")
    if backbone is not None and backbone not in {c.backbone for t in TABLES for c in cells(t)}:
        backbone_named(backbone)


def bring_all(asked: Table) -> None:
    """Every cell that can be run: by one seed after the other, so that arms can soon be compared.

    What fails is told in its row, and the next one is begun.
    """
    ready = [c for c in asked.cells if not lack(c) and c not in asked.problems]
    if not ready and not asked.problems:
        why = lack(asked.cells[0])
        raise UsageError(f"nothing of {asked.table} can be run here yet: {why}.")
    asked.sheet().write()
    for seed in range(asked.seeds):
        for cell in ready:
            try:
                bring(asked.work(cell, seed))
            except Interrupted:
                raise Interrupted("stopped; the same command goes on.") from None
            except FastidmmError as problem:
                say(f"{cell.arm} on {cell.dataset}: {problem}")
                asked.problems.setdefault(cell, problem)
            finally:
                asked.sheet().write()


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
    return sum(Record(each).seconds for each in folders)


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


def cut_short(asked: Table, budget: str, *, measure: bool) -> None:
    """Cut a table to its budget: as it was begun, or else as steps on this machine suggest."""
    began, cpu = time.perf_counter(), device_of("auto").type == "cpu"
    if cpu:
        asked.cells = unpublished(asked.cells, backbone=CPU_BACKBONE)
    asked.cut = Cut(suffix=budget, scale=CPU_SCALE if cpu else 1.0)
    asked.notes = [f"Cut to --budget {budget}: these numbers are not by the paper's protocol."]
    path = Path("runs") / f"{asked.name}.json"
    if before := _cut_before(path):
        if before.pop("seeds") != asked.seeds:
            raise UsageError(f"{path} was begun with other --seeds: repeat them, or move it away.")
        asked.cut = Cut(**before)
    elif measure and (costs := _costs(asked)):
        left = seconds_of(budget) - (time.perf_counter() - began)  # measuring takes some of it
        share, num = fitting(costs, SPENT * left)
        asked.cut = replace(asked.cut, share=share, num_images=num)
        total = sum(cost.seconds(share, num) for cost in costs)
        asked.notes.append(f"Forecast for all of it: {total / 60:.1f} minutes.")
    else:
        asked.notes.append("By how much is measured when it begins; below is all of it.")
        return
    cut = asked.cut
    sides = f"{cut.side(112)}, {cut.side(224)} and {cut.side(448)}"
    asked.notes.append(
        f"Every stage has {cut.share:.2%} of the paper's epochs, at least one, of at most "
        f"{cut.num_images} images; crops of 112, 224 and 448 px have {sides}."
    )


def _cut_before(path: Path) -> dict[str, Any] | None:
    """How a table was cut when it was begun, if it was."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] | None = json.loads(path.read_text())["cut"]
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{path} cannot be read ({problem}): move it and its runs away.") from None
    return found


def _costs(asked: Table) -> list[Cost]:
    """Every stage that is to be run, each measured once; those of all seeds."""
    make_torchvision_importable()
    import_module("timm")  # or the first stage would seem to cost what is loaded once
    known: dict[str, Cost] = {}
    costs: dict[str, Cost] = {}
    trial = replace(asked.cut, num_images=FEWEST_IMAGES)
    for cell in (c for c in asked.cells if not lack(c)):
        try:
            for name, tables, epochs in stages(cell, trial, asked.images):
                run, kind = tables["run"], json.dumps(tables)
                if kind not in known:
                    say(f"measuring {run['method']} at {run['resolution']} px on {run['dataset']}")
                    images = asked.images[run["dataset"]]
                    known[kind] = measured(tables, epochs=epochs, images=images)
                costs[name] = replace(known[kind], epochs=epochs)
        except FastidmmError as problem:
            asked.problems[cell] = problem
    return list(costs.values()) * asked.seeds
