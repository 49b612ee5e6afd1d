"""How far a run has come, and what to type: to complete it, to repeat it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastidmm.folders import RECIPE
from fastidmm.plan import num_steps
from fastidmm.recipe import Recipe, with_settings
from fastidmm.record import Record
from fastidmm.reporting.claims import FROZEN
from fastidmm.scoring import place_of
from fastidmm.stages import called, finetune_tables, flags_in_proportion, high_tables

FLAGS = {"resolution": "--resolution", "epochs": "--epochs", "batch_size": "--batch-size"}
LONGEST_NAME = 64


@dataclass(frozen=True)
class Stage:
    """How far a run, or a stage inside it, has come."""

    record: Record

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.record.folder.name

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What it was started with."""
        return self.record.environment()

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Its metric lines."""
        return self.record.metrics()

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return num_steps(self.environment["num_train"], self.record.recipe.run.batch_size)

    @property
    def steps(self) -> int:
        """Steps made, up to the newest checkpoint or, while it goes on, metric line."""
        return max(self.record.steps, int(self.lines[-1]["step"]) if self.lines else 0)

    @property
    def epoch(self) -> int:
        """The epoch it stands in, from 1 on; 0 before the first step."""
        return -(-self.steps // self.steps_per_epoch)

    @cached_property
    def finished(self) -> bool:
        """Whether all steps are made and kept, whatever became of their metric lines."""
        return self.record.finished

    @property
    def arm(self) -> str:
        """Which side of the comparison it is on."""
        return place_of(self.record)[0]

    @property
    def score_name(self) -> str:
        """What an evaluation calls its score."""
        return place_of(self.record)[1]


def missing(
    run: Stage, tuned: Sequence[Stage], scores: dict[str, Any] | None, *, scorable: bool
) -> list[tuple[str, str]]:
    """What a run lacks, each with the command that brings it; none where it only takes time."""
    name, steps = argument(run.record.folder), []
    for stage in (run, *tuned):
        if not stage.finished:
            where = f"at epoch {stage.epoch} of {stage.record.recipe.run.epochs}"
            if stage.record.running:
                steps.append((f"{stage.name} is {where}, and goes on", ""))
            else:
                steps.append((f"{stage.name} stands {where}", f"fastidmm resume {name}"))
    if not scorable:
        return steps
    # A run that learnt the classes itself needs no stage for it.
    classes = run.record.recipe.run.method == "supervised"
    steps += [] if classes else _missing_stages(run, tuned)
    if scores is None:
        steps.append(("not scored on the test images", f"fastidmm evaluate --run {name}"))
    elif any(key not in scores["pretrained"] for key in FROZEN) or any(
        stage.score_name not in scores[stage.arm] for stage in ((run, *tuned) if classes else tuned)
    ):
        steps.append(("trained on since it was scored", f"fastidmm evaluate --run {name}"))
    return steps


def _missing_stages(run: Stage, tuned: Sequence[Stage]) -> list[tuple[str, str]]:
    """The fine-tunings that a run lacks, each with its command."""
    name, steps = argument(run.record.folder), []
    first = [stage for stage in tuned if not stage.record.recipe.run.init_head]
    like = _flags(first[-1]) if first else flags_in_proportion(run.record.recipe)
    for arm, start, scratch in (
        ("pretrained", "the pretrained weights", []),
        ("random", "random weights, to compare with", ["--scratch"]),
    ):
        if not any(stage.arm == arm for stage in tuned):
            words = ["fastidmm finetune --run", name, *like, *scratch]
            steps.append((f"not fine-tuned from {start}", " ".join(words)))
    return steps + _missing_high(run, first, tuned)


def _missing_high(
    run: Stage, first: Sequence[Stage], tuned: Sequence[Stage]
) -> list[tuple[str, str]]:
    """The stage at a higher resolution, where the recipe has one and nothing else is in its way."""
    high = run.record.recipe.finetune_high
    begun = any(stage.arm == "pretrained" and stage not in first for stage in tuned)
    below = run.record.recipe.finetune.resolution  # another is no step towards the high one
    ready = any(
        stage.arm == "pretrained" and stage.finished and stage.record.resolution == below
        for stage in first
    )
    if begun or not ready or not high.epochs:
        return []
    command = f"fastidmm finetune --run {argument(run.record.folder)} --resolution "
    return [(f"not fine-tuned at {high.resolution} px", f"{command}{high.resolution}")]


def again(run: Stage, tuned: Sequence[Stage], *, evaluated: bool) -> list[str]:
    """The commands that repeat a run, its stages and its evaluation under another name."""
    folder = run.record.folder
    name = f"{called(folder.name)[: LONGEST_NAME - 6] or 'run'}-again"
    recipe = shlex.quote(str(folder / RECIPE))
    commands = [f"fastidmm pretrain --recipe {recipe} --run {name}"]
    for stage in tuned:
        before = _went_on_from(stage)
        if before and not (before / RECIPE).exists():
            at = f"the stage at {stage.record.resolution} px"
            commands.append(f"# {at} cannot be repeated: the one it went on from is gone")
            continue
        scratch = ["--scratch"] if stage.arm == "random" else []
        words = ["fastidmm finetune --run", name, *_flags(stage), *_others(run, stage), *scratch]
        commands.append(" ".join(words))
    if evaluated:
        commands.append(f"fastidmm evaluate --run {name}")
    return [*commands, f"fastidmm report --run {name}"]


def argument(folder: Path) -> str:
    """A run as the command line takes it."""
    return shlex.quote(folder.name if folder.parent == Path("runs") else str(folder))


def _went_on_from(stage: Stage) -> Path | None:
    """The stage whose classifier it took over; None: it began with a new one."""
    start = stage.record.init
    return start.parent.parent if start and stage.record.recipe.run.init_head else None


def _flags(stage: Stage) -> list[str]:
    run = stage.record.recipe.run
    return [f"{flag} {getattr(run, key)}" for key, flag in FLAGS.items()]


def _others(run: Stage, stage: Stage) -> list[str]:
    """`--set` for all in which a stage's recipe differs from what its flags alone would give."""
    own = stage.record.recipe
    settings = {f"run.{key}": getattr(own.run, key) for key in FLAGS}
    if before := _went_on_from(stage):
        tables = high_tables(Record(before))
    else:
        tables = finetune_tables(run.record, pretrained=False)
    usual = Recipe.of(with_settings(tables, settings, [])).tables()
    return [
        shlex.join(["--set", f"{table}.{key}={json.dumps(value)}"])
        for table, values in own.tables().items()
        for key, value in values.items()
        if (table, key) != ("run", "init") and usual[table].get(key) != value
    ]
