"""Runs side by side: what was scored, at which budget, and which differences can be claimed.

Runs that differ in their seed alone are one setting, whose spread over seeds a claim is tested by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from fastidmm import seeds
from fastidmm.errors import UsageError
from fastidmm.evaluate import Score
from fastidmm.folders import RECIPE, is_stage, stages
from fastidmm.record import Record
from fastidmm.reporting.claims import (
    FINETUNED,
    Arm,
    Measure,
    Outcome,
    by_chance,
    measures,
    percent,
)
from fastidmm.scoring import current, scored
from fastidmm.stages import summary
from fastidmm.terminal import line

VERDICTS = {
    "higher": "higher",
    "lower": "lower",
    "open": "no difference can be claimed",
    "unequal": "not comparable: unequal fine-tuning",
    "missing": "not run",
}
TESTED = ("higher", "lower", "open")
NEAR = 1.1  # times as long is no other budget
# What of a recipe is not of the setting: the seed; what stages begin with, which keep their own;
# and keys of [run] that change no result, or its rounding alone.
BEGINNINGS = {"finetune", "finetune_high", "supervised"}
IDLE = {
    "seed", "device", "exact", "capture", "views_ahead", "compile", "micro_batches", "log",
    "log_every", "knn_every", "checkpoint_every",
}  # fmt: skip


class Images(NamedTuple):
    """What a run learnt from."""

    dataset: str
    split: str  # the training split's fingerprint
    num: int
    chosen: tuple[int, float, int] | None  # seed, share held out, and number, that chose of them


@dataclass(frozen=True, slots=True)
class Compared:
    """A run: its scores by measure, and what they cost."""

    folder: Path
    scores: dict[str, Arm]
    budget: dict[str, Any]
    images: Images
    tested: str | None  # fingerprint of the test split as `evaluate` saw it
    seconds: float
    records: tuple[Record, ...]  # its own, and of the stages that count

    @classmethod
    def of(cls, folder: Path) -> "Compared":
        """What lies in a run's folder."""
        if is_stage(folder):
            raise UsageError(f"{folder} is a stage; name its run: {folder.parent}.")
        record = Record(folder)
        run, started = record.recipe.run, record.environment()
        evaluation = current(folder)
        learnt = [record] if run.method == "supervised" else []
        learnt += [stage for stage in map(Record, stages(folder)) if stage.pretrained]
        learnt = [stage for stage in learnt if stage.finished]
        tuned = {stage.resolution: stage for stage in learnt}
        everything = list(dict.fromkeys([record, *tuned.values()]))
        some = run.holdout or run.num_images
        chosen = (run.seed, run.holdout, run.num_images) if some else None
        budget = {
            "training images": started["num_train"],
            "pretraining epochs": 0 if run.method == "supervised" else run.epochs,
            "pretraining px": None if run.method == "supervised" else run.resolution,
            "fine-tuning epochs": {side: stage.recipe.run.epochs for side, stage in tuned.items()},
        }
        return cls(
            folder,
            {**_frozen(evaluation), **_tuned(tuned, evaluation)},
            budget,
            Images(run.dataset, started["train_fingerprint"], started["num_train"], chosen),
            evaluation.get("test_fingerprint") if evaluation else None,
            sum(each.seconds for each in everything),
            tuple(everything),
        )

    @property
    def seed(self) -> int:
        """What its chance depends on."""
        return self.records[0].recipe.run.seed

    @property
    def setting(self) -> tuple[Any, ...]:
        """What seeds of one setting have in common."""
        own, *tuned = self.records
        return self.images[:3], setting(own), {each.resolution: setting(each) for each in tuned}

    def unlike(self, other: "Compared") -> str:
        """Why scores of two runs are not of the same images, but for which a seed chose; or ""."""
        ours, theirs = self.images, other.images
        if ours[:2] != theirs[:2]:
            return "other images"
        if ours.num != theirs.num:
            return f"trained on {ours.num} and on {theirs.num} images"
        tested = {self.tested, other.tested} - {None}
        return "other test images" if len(tested) > 1 else ""

    def beside(self, first: "Compared", name: str) -> tuple[Measure, str]:
        """A measure of this run and of another; and why they cannot be compared, or ""."""
        return Group((self,)).beside(Group((first,)), name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scores = {n: {**a.score.as_dict(), "epochs": a.epochs} for n, a in self.scores.items()}
        told = {"run": str(self.folder), "dataset": self.images.dataset, "scores": scores}
        return {**told, "budget": self.budget, "seconds": round(self.seconds, 1)}


def _frozen(evaluation: dict[str, Any] | None) -> dict[str, Arm]:
    """Scores on frozen features, where `evaluate` has been."""
    found = {m.name: m.pretrained for m in measures(evaluation["scores"])} if evaluation else {}
    return {name: arm for name, arm in found.items() if arm and not arm.epochs}


def _tuned(tuned: dict[int, Record], evaluation: dict[str, Any] | None) -> dict[str, Arm]:
    """Scores of fine-tuned stages as `evaluate` found them, or else as told in their last epoch.

    With images held out no stage tells any, since it never sees the test images.
    """
    found = {}
    for side, stage in sorted(tuned.items()):
        _, cell = scored(stage, evaluation) or ("", None)
        if top := cell or summary(stage).get("test_top1"):
            cell = {**top, "epochs": stage.recipe.run.epochs}
            scores = {"pretrained": {f"{FINETUNED}{side}": cell}}
            (measure,) = (m for m in measures(scores) if m.pretrained)
            assert measure.pretrained
            found[measure.name] = measure.pretrained
    return found


def setting(record: Record) -> dict[str, Any]:
    """A recipe without its seed and what is no part of the setting; so of what it began with."""
    tables: dict[str, Any] = record.recipe.tables()
    tables = {name: table for name, table in tables.items() if name not in BEGINNINGS}
    tables["run"] = {key: value for key, value in tables["run"].items() if key not in IDLE}
    start = record.init
    if start is not None and (start.parent.parent / RECIPE).exists():
        source = Record(start.parent.parent)
        # Which step was the best is chance as well.
        step = "best" if start.parent == source.best else start.name
        tables["run"]["init"] = [setting(source), step]
    return tables


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one setting, each by a seed of its own; often one."""

    runs: tuple[Compared, ...]

    def takes(self, run: Compared) -> bool:
        """Whether a run is another seed of this setting; one that is not finished is of none."""
        if any(run.seed == other.seed or run.unlike(other) for other in self.runs):
            return False
        same = run.setting == self.runs[0].setting
        return same and all(each.records[0].finished for each in (run, self.runs[0]))

    @property
    def folder(self) -> Path:
        """Of the first run, by whose name the group goes."""
        return self.runs[0].folder

    @property
    def name(self) -> str:
        """In a table."""
        several = f" ({len(self.runs)} seeds)" if len(self.runs) > 1 else ""
        return f"{self.folder.name}{several}"

    @property
    def seconds(self) -> float:
        """Of training, the mean over seeds."""
        return mean(run.seconds for run in self.runs)

    @property
    def names(self) -> list[str]:
        """Of what any run has a score of."""
        return list(dict.fromkeys(name for run in self.runs for name in run.scores))

    def scored(self, name: str) -> list[Compared]:
        """The runs that have a score of this measure."""
        return [run for run in self.runs if name in run.scores]

    def values(self, name: str) -> list[float]:
        """Their scores, as shares."""
        return [run.scores[name].score.value for run in self.scored(name)]

    def arm(self, name: str) -> Arm | None:
        """The score of a run, or the mean over seeds as right answers among the test images."""
        arms = [run.scores[name] for run in self.scored(name)]
        if len(arms) < 2:
            return arms[0] if arms else None
        num = arms[0].score.num
        return Arm(Score(round(mean(self.values(name)) * num), num), arms[0].epochs)

    def beside(self, first: "Group", name: str) -> tuple[Measure, str]:
        """A measure of this group and of another; and why they cannot be compared, or ""."""
        measure = Measure(name, self.arm(name), first.arm(name))
        if measure.pretrained is None or measure.random is None:
            return measure, ""
        ours, theirs = self.scored(name), first.scored(name)
        if why := next(filter(None, (a.unlike(b) for a in ours for b in theirs)), ""):
            return measure, why
        if {run.images.chosen for run in ours} != {run.images.chosen for run in theirs}:
            return measure, "other images of the same dataset"
        if len({run.scores[name].score.num for run in (*ours, *theirs)}) > 1:
            return measure, "other test images"
        return measure, ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scores = {}
        for name in self.names:
            values, arm = self.values(name), self.arm(name)
            assert arm
            # Seeds that are all alike tell as little as one: the test images are few.
            spread = len(set(values)) > 1
            low, high = seeds.interval(values) if spread else arm.score.interval
            told = {"value": mean(values), "interval": [low, high], "seeds": len(values)}
            scores[name] = {**told, "epochs": arm.epochs}
        return {
            "name": self.name,
            "runs": [str(run.folder) for run in self.runs],
            "seeds": [run.seed for run in self.runs],
            "scores": scores,
            "budget": self.runs[0].budget,
            "seconds": round(self.seconds, 1),
        }


def grouped(runs: Sequence[Compared]) -> list[Group]:
    """Runs by their settings, in the order given; a seed that is repeated begins another group."""
    found: list[Group] = []
    for run in runs:
        place = next((i for i, group in enumerate(found) if group.takes(run)), None)
        if place is None:
            found.append(Group((run,)))
        else:
            found[place] = Group((*found[place].runs, run))
    return found


def compare(folders: list[Path]) -> dict[str, Any]:
    """All settings beside the first: scores, differences that can be claimed, unequal budgets."""
    if len(set(folders)) < 2:
        raise UsageError("name two or more runs: `fastidmm compare ONE OTHER`.")
    found = [Compared.of(folder) for folder in folders]
    first, *others = groups = grouped(found)
    names = list(dict.fromkeys(name for run in found for name in run.scores))
    claims = [_claim(name, group, first) for group in others for name in names]
    return {
        "runs": [run.as_dict() for run in found],
        "groups": [group.as_dict() for group in groups],
        "claims": claims,
        "unequal": [line for group in others for line in _unequal(first, group)],
    }


def _claim(name: str, group: Group, first: Group) -> dict[str, Any]:
    measure, why = group.beside(first, name)
    ours, theirs = group.values(name), first.values(name)
    comparable = ours and theirs and not why
    return {
        "run": str(group.folder),
        "than": str(first.folder),
        "measure": name,
        "outcome": "unequal" if why else _outcome(measure, ours, theirs),
        "points": 100 * (mean(ours) - mean(theirs)) if comparable else None,
        "why": why,
        "seeds": [len(ours), len(theirs)],
    }


def _outcome(measure: Measure, ours: list[float], theirs: list[float]) -> Outcome:
    """By a test over seeds; where one has a single seed, by that of test images as well.

    By that of test images alone where there is no spread over seeds.
    """
    outcome = measure.outcome
    if outcome not in TESTED or (differ := seeds.differ(ours, theirs)) is None:
        return outcome
    if not differ:
        return "open"
    if 1 in (len(ours), len(theirs)):
        return outcome
    return "higher" if mean(ours) > mean(theirs) else "lower"


def _unequal(first: Group, group: Group) -> list[str]:
    """In what two budgets differ, a sentence each."""
    found = []
    for key, ours in first.runs[0].budget.items():
        theirs = group.runs[0].budget[key]
        if ours != theirs:
            said = f"{_said(ours)} in {first.folder}, {_said(theirs)} in {group.folder}"
            found.append(f"{key}: {said}")
    short, long = sorted((first.seconds, group.seconds))
    if long > NEAR * short:
        times = f"{first.seconds:.0f} s in {first.folder}, {group.seconds:.0f} s in {group.folder}"
        found.append(f"training time: {times}")
    return found


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{epochs} at {side} px" for side, epochs in value.items()) or "none"
    return "none" if value in (None, 0) else str(value)


def as_text(found: dict[str, Any]) -> str:
    """The table a person reads: a setting a column, the claims and budgets below."""
    groups = found["groups"]
    names = list(dict.fromkeys(name for group in groups for name in group["scores"]))
    rows = [["", *(line(group["name"]) for group in groups)]]
    for name in names:
        rows.append([name, *(_cell(group, name) for group in groups)])
    for key in groups[0]["budget"]:
        rows.append([key, *(_said(group["budget"][key]) for group in groups)])
    rows.append(["seconds of training", *(f"{group['seconds']:.0f}" for group in groups)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    for group in groups:
        if len(group["runs"]) > 1:
            runs = ", ".join(line(Path(run).name) for run in group["runs"])
            name = line(group["name"])
            lines.append(f"{name}: the mean, and its 95 % interval over seeds, of {runs}")
    if found["claims"]:
        lines += ["", f"beside {found['runs'][0]['run']}:", *_claims_text(found)]
    else:
        lines.append("seeds of one setting: name runs of another to compare it with")
    if found["unequal"]:
        lines += ["", "budgets differ:", *(f"  {line}" for line in found["unequal"])]
    for run in found["runs"]:
        if not any(not cell["epochs"] for cell in run["scores"].values()):
            lines.append(f"frozen features not scored: fastidmm evaluate {run['run']}")
    return "\n".join(lines)


def _claims_text(found: dict[str, Any]) -> list[str]:
    """A line each, and what is to be known of all."""
    named = {group["runs"][0]: group["name"] for group in found["groups"]}
    lines = []
    for claim in found["claims"]:
        words = (claim["why"] and f"not comparable: {claim['why']}") or VERDICTS[claim["outcome"]]
        if claim["points"] is not None and claim["outcome"] in ("higher", "lower"):
            words += f" by {abs(claim['points']):.1f} points"
        lines.append(f"  {line(named[claim['run']])}, {claim['measure']}: {words}")
    tested = [claim for claim in found["claims"] if claim["outcome"] in TESTED]
    numbers = [sorted(claim["seeds"]) for claim in tested]
    if [1, 1] in numbers:
        lines.append("one run each: what another seed would change is not in this")
    if any(few == 1 < many for few, many in numbers):
        lines.append("one run beside several: seeds are taken to change it as they change those")
    if told := by_chance([claim["outcome"] for claim in tested]):
        lines.append(told)
    return lines


def _cell(group: dict[str, Any], name: str) -> str:
    score = group["scores"].get(name)
    if score is None:
        return "not run"
    low, high = score["interval"]
    some = f" of {score['seeds']}" if score["seeds"] < len(group["runs"]) else ""
    return f"{percent(score['value'])} [{100 * low:.1f}, {100 * high:.1f}]{some}"
