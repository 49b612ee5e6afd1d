"""RandAugment against Pillow, operation by operation and level by level, and its distribution."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from synthetic import photograph
from torch import Tensor

from fastidmm import colour
from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.loaders.pillow import randaugmented
from fastidmm.plan import GroupPlan, draw
from fastidmm.randaugment import LEVELS, NONE, OPERATIONS, randaugment, smooth

Picture = Image.Image
SIDES = [1, 2, 17, 48, 224]


def tensor_of(image: Picture) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def ours(name: str, level: int, sign: int, spot: tuple[int, int], x: Tensor) -> Tensor:
    return randaugment(
        x.clone(),
        torch.tensor([[OPERATIONS.index(name)]]),
        torch.tensor([[level]]),
        torch.tensor([[sign < 0]]),
        torch.tensor([[spot]]),
    )


# Largest difference from Pillow's 8 bits, in 1/255, on pictures of 8 bits: the fraction that Pillow
# cuts off where it blends or shears, and nothing at all elsewhere. The gray that contrast and color
# blend with, and the smoothed picture of sharpness, are rounded in Pillow: up to 0.45 more.
BOUNDS = dict.fromkeys(OPERATIONS, 0.0) | {
    "shear_x": 1.01, "shear_y": 1.01, "brightness": 1.01, "color": 1.46, "contrast": 1.46,
    "sharpness": 1.46,
}  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name: str, side: int) -> None:
    images = [Image.fromarray(photograph(side, side, seed)) for seed in range(2)]
    # Two that equalize and autocontrast treat alone: dark with a narrow range, and of one colour.
    images.append(Image.fromarray((photograph(side, side, 3) // 5 + 40).astype(np.uint8)))
    images.append(Image.new("RGB", (side, side), (7, 200, 255)))
    for image, level, sign in itertools.product(images, range(1, LEVELS + 1), (1, -1)):
        spot = (side // 3, side - 1)
        expected = tensor_of(randaugmented(image, name, level, sign, spot))
        found = ours(name, level, sign, spot, tensor_of(image))
        difference = (found - expected).abs().max() * 255
        assert float(difference) <= BOUNDS[name] + 1e-4, (level, sign)


def test_all_fifteen_change_a_photograph() -> None:
    image = Image.fromarray(photograph(48, 48, 1) // 2 + 30)
    for name in OPERATIONS:
        changed = ours(name, 9, 1, (20, 20), tensor_of(image))
        assert float((changed - tensor_of(image)).abs().mean()) > 1e-3, name


def test_smooth_is_pillows_to_rounding() -> None:
    image = Image.fromarray(photograph(37, 37, 1))
    theirs = tensor_of(image.filter(ImageFilter.SMOOTH))
    assert float((smooth(tensor_of(image)) - theirs).abs().max() * 255) <= 0.51


def test_tables_round_what_lies_between_levels() -> None:
    x = tensor_of(Image.fromarray(photograph(17, 17, 1)))
    moved = (x + 0.4 / 255 * torch.linspace(-1, 1, 17)).clamp(0, 1)
    for name in ("invert", "posterize", "solarize", "autocontrast", "equalize"):
        assert torch.equal(ours(name, 5, 1, (0, 0), x), ours(name, 5, 1, (0, 0), moved))


# --- batches ------------------------------------------------------------------------------------

GROUP = ViewGroup(count=2, size=19, scale=(0.2, 1.0), randaugment=2)


def drawn(num: int, group: ViewGroup = GROUP, step: int = 0, seed: int = 3) -> GroupPlan:
    sides = torch.full((num,), 40)
    return draw((sides, sides), [group], Counters(seed), step=step, batch_size=num).groups[0]


def args(plan: GroupPlan) -> tuple[Tensor, ...]:
    return plan.operation, plan.level, plan.negative, plan.spot


@pytest.mark.parametrize("gpu", [False, True])
def test_a_batch_is_its_crops_one_by_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operations in their order, whatever stands beside a crop; on either device's way."""
    plan = drawn(100)
    x = torch.cat([tensor_of(Image.fromarray(photograph(19, 19, i))) for i in range(200)])
    monkeypatch.setattr(colour, "on_gpu", lambda _: gpu)
    together = randaugment(x.clone(), *args(plan))
    for i in range(200):
        one = x[i : i + 1].clone()
        for turn in range(2):
            which = int(plan.operation[i, turn])
            if which != NONE:
                down, across = plan.spot[i, turn].tolist()
                sign = -1 if plan.negative[i, turn] else 1
                one = ours(OPERATIONS[which], int(plan.level[i, turn]), sign, (down, across), one)
        assert float((together[i] - one).abs().max()) < 1e-6


# --- distribution -------------------------------------------------------------------------------


def near(counts: Tensor, share: float) -> bool:
    """Whether all counts are within five deviations of their share of the total."""
    total = int(counts.sum())
    deviation = math.sqrt(total * share * (1 - share))
    return bool(((counts - total * share).abs() < 5 * deviation).all())


def test_the_distribution_over_1e5_draws() -> None:
    plan = drawn(50_000)
    applied = plan.operation != NONE
    assert plan.operation.shape == (100_000, 2)
    for turn in range(2):
        chosen = plan.operation[applied[:, turn], turn]
        assert near(chosen.bincount(minlength=15), 1 / 15) and chosen.max() == 14
        assert near(plan.level[:, turn].bincount(minlength=10)[1:], 1 / 9)
        assert plan.level[:, turn].min() == 1 and plan.level[:, turn].max() == 9
        assert near(plan.negative[:, turn].long().bincount(), 1 / 2)
        for axis in range(2):
            assert near(plan.spot[:, turn, axis].bincount(minlength=19), 1 / 19)
    both = applied.all(dim=1)
    pairs = plan.operation[both, 0] * 15 + plan.operation[both, 1]
    # Each applied half the time, independently; all 225 pairs alike, repeats among them.
    assert near((applied[:, 0].long() * 2 + applied[:, 1]).bincount(minlength=4), 1 / 4)
    assert near(pairs.bincount(minlength=225), 1 / 225)
    cells = (plan.operation[:, 0] * 9 + plan.level[:, 0] - 1)[applied[:, 0]]
    assert near(cells.bincount(minlength=135), 1 / 135)
    signed = plan.level[:, 0] * 2 + plan.negative[:, 0] - 2
    assert near(signed.bincount(minlength=18), 1 / 18)


def test_draws_belong_to_an_image_an_epoch_and_a_view() -> None:
    """Whatever the batch: the second half of an epoch's rows, drawn alone, has the same."""
    sides = torch.full((10,), 40)
    whole = draw((sides, sides), [GROUP], Counters(3), step=0, batch_size=10)
    half = draw((sides, sides), [GROUP], Counters(3), step=1, batch_size=5)
    for mine, theirs in zip(args(whole.groups[0]), args(half.groups[0]), strict=True):
        assert torch.equal(mine[[*range(5, 10), *range(15, 20)]], theirs)
    assert not torch.equal(drawn(10).level, drawn(10, step=1).level)
    assert not torch.equal(drawn(10).level, drawn(10, seed=4).level)
    assert not torch.equal(drawn(10).level[:10], drawn(10).level[10:])


def test_without_randaugment_nothing_is_drawn() -> None:
    plan = drawn(7, replace(GROUP, randaugment=0))
    assert plan.operation.shape == (14, 0) and plan.spot.shape == (14, 0, 2)
