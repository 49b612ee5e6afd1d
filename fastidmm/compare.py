"""Runs side by side: what was scored, at which budget, and which differences can be claimed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastidmm.errors import UsageError
from fastidmm.record import RECIPE, Record, stages
from fastidmm.reporting.claims import FINETUNED, Arm, Measure, by_chance, measures, percent
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
NEAR = 1.1  # times as long is no other budget


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

    @classmethod
    def of(cls, folder: Path) -> "Compared":
        """What lies in a run's folder."""
        if (folder.parent / RECIPE).exists():
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
            sum(float(each.state.get("seconds", 0.0)) for each in everything),
        )

    def beside(self, first: "Compared", name: str) -> tuple[Measure, str]:
        """A measure of this run and of another; and why they cannot be compared, or ""."""
        measure = Measure(name, self.scores.get(name), first.scores.get(name))
        ours, theirs = self.images, first.images
        if measure.pretrained is None or measure.random is None:
            return measure, ""
        if ours[:2] != theirs[:2]:
            return measure, "other images"
        if ours.num != theirs.num:
            return measure, f"trained on {ours.num} and on {theirs.num} images"
        if ours.chosen != theirs.chosen:
            return measure, "other images of the same dataset"
        tested = {self.tested, first.tested} - {None}
        if len(tested) > 1 or measure.pretrained.score.num != measure.random.score.num:
            return measure, "other test images"
        return measure, ""

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


def compare(folders: list[Path]) -> dict[str, Any]:
    """All runs beside the first: scores, differences that can be claimed, unequal budgets."""
    if len(set(folders)) < 2:
        raise UsageError("name two or more runs: `fastidmm compare ONE OTHER`.")
    first, *others = found = [Compared.of(folder) for folder in folders]
    names = list(dict.fromkeys(name for run in found for name in run.scores))
    claims = [
        {"run": str(run.folder), "than": str(first.folder), **_claim(name, run, first)}
        for run in others
        for name in names
    ]
    unequal = [line for run in others for line in _unequal(first, run)]
    return {"runs": [run.as_dict() for run in found], "claims": claims, "unequal": unequal}


def _claim(name: str, run: Compared, first: Compared) -> dict[str, Any]:
    measure, why = run.beside(first, name)
    if why:
        return {"measure": name, "outcome": "unequal", "points": None, "why": why}
    return {"measure": name, "outcome": measure.outcome, "points": measure.points, "why": ""}


def _unequal(first: Compared, run: Compared) -> list[str]:
    """In what two budgets differ, a sentence each."""
    found = []
    for key, ours in first.budget.items():
        theirs = run.budget[key]
        if ours != theirs:
            found.append(f"{key}: {_said(ours)} in {first.folder}, {_said(theirs)} in {run.folder}")
    short, long = sorted((first.seconds, run.seconds))
    if long > NEAR * short:
        times = f"{first.seconds:.0f} s in {first.folder}, {run.seconds:.0f} s in {run.folder}"
        found.append(f"training time: {times}")
    return found


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{epochs} at {side} px" for side, epochs in value.items()) or "none"
    return "none" if value in (None, 0) else str(value)


def as_text(found: dict[str, Any]) -> str:
    """The table a person reads: a run a column, the claims and budgets below."""
    names = list(dict.fromkeys(name for run in found["runs"] for name in run["scores"]))
    rows = [["", *(line(Path(run["run"]).name) for run in found["runs"])]]
    for name in names:
        rows.append([name, *(_cell(run["scores"].get(name)) for run in found["runs"])])
    for key in found["runs"][0]["budget"]:
        rows.append([key, *(_said(run["budget"][key]) for run in found["runs"])])
    rows.append(["seconds of training", *(f"{run['seconds']:.0f}" for run in found["runs"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines += ["", f"beside {found['runs'][0]['run']}:"]
    for claim in found["claims"]:
        words = (claim["why"] and f"not comparable: {claim['why']}") or VERDICTS[claim["outcome"]]
        if claim["points"] is not None and claim["outcome"] in ("higher", "lower"):
            words += f" by {abs(claim['points']):.1f} points"
        lines.append(f"  {line(Path(claim['run']).name)}, {claim['measure']}: {words}")
    if told := by_chance([claim["outcome"] for claim in found["claims"]]):
        lines.append(told)
    if found["unequal"]:
        lines += ["", "budgets differ:", *(f"  {line}" for line in found["unequal"])]
    for run in found["runs"]:
        if not any(not cell["epochs"] for cell in run["scores"].values()):
            lines.append(f"frozen features not scored: fastidmm evaluate {run['run']}")
    return "\n".join(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "not run"
    low, high = score["interval"]
    return f"{percent(score['value'])} [{100 * low:.1f}, {100 * high:.1f}]"
