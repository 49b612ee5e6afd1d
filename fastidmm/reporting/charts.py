"""Which curves a run's metric lines hold: those known by name first, then all others."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastidmm.reporting.commands import Stage
from fastidmm.reporting.curves import Series, chart

# Key of a metric line: title, unit.
CURVES = {
    "loss": ("Pretraining loss", ""),
    "instance_top1": ("Instance top-1: images recognised as themselves", " %"),
    "contrast_top1": ("Contrast top-1: crops whose nearest other attracts them", " %"),
    "teacher_entropy": ("Entropy of the teacher's probabilities, nats", ""),
    "train_top1": ("Training top-1", " %"),
    "knn_top1": ("kNN on training labels, leave-one-out", " %"),
}
TUNED_CURVES = {
    "loss": ("Fine-tuning loss", ""),
    "train_top1": ("Fine-tuning: top-1 on training crops", " %"),
    "holdout_top1": ("Fine-tuning: top-1 on held-out images", " %"),
    "test_top1": ("Fine-tuning: top-1 on test images", " %"),
}
# Of features, without labels: the first to look at where there are none.
LABEL_FREE_CURVES = {
    "retrieval_top1": ("Retrieval: crops that find the other of their image", " %"),
    "rankme": ("RankMe: directions that features use", ""),
    "uniformity": ("Uniformity: 0 when all features are alike, to about -4", ""),
    "alignment": ("Alignment: two crops' distance, 0 when alike, to 4", ""),
}
MORE_CURVES = {
    **LABEL_FREE_CURVES,
    "spread": ("Features about their mean, share of their length", " %"),
    "grad_norm": ("Norm of the gradients", ""),
    "lr": ("Learning rate", ""),
    "images_per_second": ("Images per second", ""),
    "data_wait": ("Share of time spent waiting for data", " %"),
}
NO_CURVES = {"epoch", "step", "skipped", "holdout_num", "test_num"}


@dataclass(frozen=True, slots=True)
class Charts:
    """The curves to look at first, and those that explain them."""

    first: list[Markup]
    more: list[Markup]


def charts(run: Stage, tuned: Sequence[Stage], *, learnable: bool) -> Charts:
    """Every curve there are points for; without classes kNN says nothing, and others come first."""
    found = Charts([], [])
    first = CURVES if learnable else CURVES | LABEL_FREE_CURVES
    for known, sources, kind in ((first, [run], ""), (TUNED_CURVES, tuned, "Fine-tuning: ")):
        keys = dict.fromkeys([*known, *MORE_CURVES, *_keys(sources)])
        for key in keys:
            if key == "knn_top1" and (not learnable or key not in known):
                continue
            title, unit = known.get(key) or _titled(key, kind)
            series = [_series(stage, key, factor=100.0 if unit else 1.0) for stage in sources]
            # A stage's one score is no curve, and stands in the table of scores.
            if any(len(s.points) > (known is TUNED_CURVES) for s in series):
                (found.first if key in known else found.more).append(
                    chart(title, series, unit=unit)
                )
    return found


def _keys(sources: Iterable[Stage]) -> list[str]:
    """What lines hold numbers of, in the order of their coming."""
    keys = dict.fromkeys(key for stage in sources for line in stage.lines for key in line)
    return [key for key in keys if key not in NO_CURVES]


def _titled(key: str, kind: str) -> tuple[str, str]:
    words, unit = MORE_CURVES.get(key) or (key.replace("_", " "), "")
    return (f"{kind}{words[0].lower()}{words[1:]}" if kind else words), unit


def _series(stage: Stage, key: str, *, factor: float) -> Series:
    """A metric over epochs; values that were not finite are left out."""
    values = [(line["step"] / stage.steps_per_epoch, line.get(key)) for line in stage.lines]
    return Series(
        stage.name, [(epoch, factor * v) for epoch, v in values if isinstance(v, int | float)]
    )
