"""What an evaluation lets one say about pretraining, and no more than that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastidmm.evaluate import Score, differ

ARMS = ("pretrained", "random")
FROZEN = {
    "knn": "kNN accuracy on frozen features",
    "linear_probe": "linear-probe accuracy on frozen features",
}
FINETUNED = "finetuned_"

HANDFUL = 5  # tests whose number need not be told

Outcome = Literal["higher", "lower", "open", "unequal", "missing"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One score, and the epochs of fine-tuning behind it (0: frozen features)."""

    score: Score
    epochs: int = 0
    best: dict[str, Any] | None = None  # the highest of the test scores while it learnt
    stage: str = ""  # that was fine-tuned


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing measured with pretraining and without; None where it was not run."""

    name: str
    pretrained: Arm | None = None
    random: Arm | None = None

    @property
    def arms(self) -> tuple[Arm | None, Arm | None]:
        """Both, pretrained first."""
        return self.pretrained, self.random

    @property
    def outcome(self) -> Outcome:
        """What can be claimed of pretraining: a difference only where a test at 5 % finds one."""
        if self.pretrained is None or self.random is None:
            return "missing"
        if self.pretrained.epochs != self.random.epochs:
            return "unequal"
        with_it, without = self.pretrained.score, self.random.score
        if not differ(with_it, without):
            return "open"
        return "higher" if with_it.value > without.value else "lower"

    @property
    def points(self) -> float | None:
        """Percentage points that the pretrained arm is ahead."""
        if self.pretrained is None or self.random is None:
            return None
        return 100 * (self.pretrained.score.value - self.random.score.value)


def by_chance(outcomes: Sequence[Outcome]) -> str:
    """What to say of many tests side by side, each at 5 %; "" of a handful."""
    num = sum(outcome in ("higher", "lower", "open") for outcome in outcomes)
    if num <= HANDFUL:
        return ""
    return (
        f"{num} differences are tested here, each at 5 %: were there none at all, chance alone "
        f"would still claim about {0.05 * num:.1f}."
    )


def percent(share: float) -> str:
    """A share as people read it, never broken between two lines."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def measures(scores: dict[str, Any], *, frozen: bool = True) -> list[Measure]:
    """The measures of an evaluation; fine-tuning has a row even where it was not run.

    Without `frozen`: of a run that learnt classes, whose features tell nothing of pretraining.
    """
    keys = dict.fromkeys(
        [
            *(FROZEN if frozen else ()),
            *(key for arm in ARMS for key in scores.get(arm, {}) if frozen or key not in FROZEN),
        ]
    )
    found = [
        Measure(title(key), *(_arm(scores.get(arm, {}).get(key)) for arm in ARMS)) for key in keys
    ]
    if not any(key.startswith(FINETUNED) for key in keys):
        found.append(Measure("fine-tuned accuracy"))
    return found


def title(key: str) -> str:
    """What an evaluation measures under a key, in words."""
    if key.startswith(FINETUNED):
        return f"fine-tuned accuracy at {key.removeprefix(FINETUNED)} px"
    return FROZEN.get(key, key)


def _arm(value: dict[str, Any] | None) -> Arm | None:
    if value is None:
        return None
    score = Score(value["correct"], value["num"])
    return Arm(score, value.get("epochs", 0), value.get("best"), value.get("stage", ""))


def verdict(found: Sequence[Measure], cause: str, *, num_test: int) -> str:
    """One sentence on what `cause`, as pretraining, did, as far as the test images can tell."""
    kinds = {kind: [m for m in found if m.outcome == kind] for kind in ("higher", "lower", "open")}
    verbs = {"higher": "lifted", "lower": "lowered"}
    clear = " and ".join(
        f"{verb} {_listed([_change(m) for m in kinds[kind]])}"
        for kind, verb in verbs.items()
        if kinds[kind]
    )
    alike = _listed([_beside(m) for m in kinds["open"]])
    if clear and alike:
        return f"{cause} {clear}; for {alike} no difference can be claimed."
    if clear:
        return f"{cause} {clear}."
    if alike:
        return (
            f"{cause} made no difference that {num_test:,} test images can show: for {alike} "
            "no difference can be claimed."
        )
    return f"{cause} has not been compared with random initialisation on equal terms yet."


def _change(measure: Measure) -> str:
    assert measure.pretrained and measure.random
    before, after = measure.random.score.value, measure.pretrained.score.value
    return f"{measure.name} from {percent(before)} to {percent(after)}"


def _beside(measure: Measure) -> str:
    assert measure.pretrained and measure.random
    with_it, without = measure.pretrained.score.value, measure.random.score.value
    return f"{measure.name} ({percent(with_it)} with it, {percent(without)} without)"


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
