"""Where a classifier errs: right answers by class, and which class is taken for which."""

from dataclasses import dataclass
from typing import Any

from fastidmm.reporting.claims import ARMS, title


@dataclass(frozen=True, slots=True)
class OfClass:
    """A class, its test images, and how many of them each arm got right; None: not run."""

    name: str
    num: int
    right: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Mistakes:
    """All classes, the hardest first, and all confusions, the most frequent first."""

    measure: str
    classes: list[OfClass]
    confused: list[tuple[str, str, int, int]]  # class, taken for, how often, of how many


def mistakes(evaluation: dict[str, Any]) -> Mistakes | None:
    """Of the last measure of the pretrained arm; None where there is none such."""
    names, scores = evaluation.get("class_names"), evaluation["scores"]
    if not scores["pretrained"]:
        return None
    key = list(scores["pretrained"])[-1]
    arms = [scores[arm].get(key) for arm in ARMS]
    if not names or any(arm and not arm.get("per_class") for arm in arms):
        return None
    num = [of_class[1] for of_class in arms[0]["per_class"]]
    classes = [
        OfClass(name, num[i], tuple(arm["per_class"][i][0] if arm else None for arm in arms))
        for i, name in enumerate(names)
    ]
    confused = [
        (names[true], names[taken], count, num[true]) for true, taken, count in arms[0]["confusion"]
    ]
    return Mistakes(title(key), sorted(classes, key=_share), confused)


def _share(of_class: OfClass) -> float:
    return (of_class.right[0] or 0) / of_class.num if of_class.num else 1.0
