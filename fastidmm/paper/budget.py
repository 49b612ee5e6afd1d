"""How much of the paper's protocol a machine does in a given time, measured before it begins."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastidmm.errors import UsageError
from fastidmm.recipe import Recipe, Tables
from fastidmm.trial import soon_gone, tried

UNITS = {"s": 1, "m": 60, "h": 3600}
FEWEST_EPOCHS = 1 / 50  # share of the protocol's: 16 of pretraining, 4 of fine-tuning
FEWEST_IMAGES, LEAST_IMAGES = 128, 32
ONE_EPOCH = 1 / 800
SPENT = 0.85  # of the budget: what a machine shares with others varies
CHECKPOINTS = 2  # of a stage that is cut: before and after its epochs


def seconds_of(budget: str) -> float:
    """`90s`, `10m` or `2h` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found or not float(found[1]):
        raise UsageError(f"--budget {budget}: give a time such as 90s, 10m or 2h.")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage of the protocol costs on this machine."""

    epochs: int  # in the paper
    images: int  # there are to train on
    per_image: float  # seconds for an image in an epoch
    fixed: float  # seconds besides, whatever the length

    def seconds(self, share: float, num_images: int) -> float:
        """Of so much of it."""
        epochs = max(1, round(share * self.epochs))
        return self.fixed + self.per_image * epochs * min(self.images, num_images)


def fitting(costs: Sequence[Cost], seconds: float) -> tuple[float, int]:
    """The share of epochs and the images that fit: the same for every stage of every arm.

    Epochs are cut first, down to a fiftieth; then images, down to 128; then epochs again, down to
    one of pretraining; then images again, down to 32.
    """

    def fits(share: float, num: int) -> bool:
        return sum(cost.seconds(share, num) for cost in costs) <= seconds

    most = max(cost.images for cost in costs)
    few, least = min(FEWEST_IMAGES, most), min(LEAST_IMAGES, most)
    if not fits(ONE_EPOCH, least):
        needed = sum(cost.seconds(ONE_EPOCH, least) for cost in costs) / SPENT
        raise UsageError(
            f"the least of it takes {needed / 60:.1f} minutes here: give that --budget, or fewer "
            "--seeds."
        )
    if fits(FEWEST_EPOCHS, most):
        return _largest(lambda share: fits(share, most), FEWEST_EPOCHS, 1.0), most
    if fits(FEWEST_EPOCHS, few):
        return FEWEST_EPOCHS, int(_largest(lambda num: fits(FEWEST_EPOCHS, int(num)), few, most))
    if fits(ONE_EPOCH, few):
        return _largest(lambda share: fits(share, few), ONE_EPOCH, FEWEST_EPOCHS), few
    return ONE_EPOCH, int(_largest(lambda num: fits(ONE_EPOCH, int(num)), least, few))


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number between two that fits, as `low` does, to a thousandth."""
    if fits(high):
        return high
    while high - low > low / 1000:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measured(tables: Tables, *, epochs: int, images: int) -> Cost:
    """What a stage with these tables costs, by some of its steps, a look and a checkpoint."""
    with soon_gone(".trial-") as work:
        found = tried(work / "trial", Recipe.of(tables))
    costs = found.costs
    fixed = found.opening + found.warm_up + costs.knn + costs.score
    per_image = costs.full / found.course.batch
    return Cost(epochs, images, per_image, fixed + CHECKPOINTS * costs.checkpoint)
