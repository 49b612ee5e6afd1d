"""Plans are pure functions of their counters, and have torchvision's and the paper's statistics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters, philox
from fastidmm.plan import (
    GroupPlan,
    Plan,
    central_crops,
    draw,
    num_steps,
    resized_crop_box,
    unmixed,
)

LARGE = ViewGroup(
    count=2,
    size=112,
    scale=(0.14, 1.0),
    jitter=0.8,
    brightness=(0.2, 1.8),
    contrast=(0.4, 1.6),
    saturation=(0.6, 1.4),
    hue=(-0.2, 0.2),
    gray=0.2,
    blur=0.5,
    solarize=0.1,
    mix="cutmix",
)
SMALL = replace(LARGE, count=4, size=37, scale=(0.05, 0.4))
GROUPS = [LARGE, SMALL]


def sizes_of(num: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(num)
    return 30 + rows * 7 % 41, 25 + rows * 13 % 57


def drawn(
    step: int, *, num: int = 23, batch: int = 7, seed: int = 0, attempt: int = 0, parts: int = 4
) -> Plan:
    counters = Counters(seed, attempt)
    return draw(sizes_of(num), GROUPS, counters, step=step, batch_size=batch, cutmix_groups=parts)


def per_crop(plan: GroupPlan) -> Tensor:
    """Everything drawn for each crop by itself: (C, numbers) float64."""
    crops = plan.crops
    flags = torch.stack((plan.flip, plan.jitter, plan.gray, plan.blur, plan.solarize), dim=1)
    columns = (crops.origin, crops.scale, crops.window, flags, plan.order, plan.factors)
    return torch.cat([*(c.double() for c in columns), plan.sigma[:, None].double()], dim=1)


def by_crop(steps: range, **settings: int) -> dict[tuple[int, int, int], Tensor]:
    """What is drawn in some steps, by (row, group, view)."""
    found = {}
    for step in steps:
        plan = drawn(step, **settings)
        for index, group in enumerate(plan.groups):
            values = per_crop(group).unflatten(0, (GROUPS[index].count, -1))
            for view in range(GROUPS[index].count):
                for place, row in enumerate(plan.rows.tolist()):
                    assert (row, index, view) not in found
                    found[row, index, view] = values[view, place]
    return found


def everything(plan: Plan) -> Tensor:
    mixes = [torch.cat((g.partner[:, None], g.box, g.weight[:, None]), 1) for g in plan.groups]
    crops = [per_crop(group) for group in plan.groups]
    return torch.cat([plan.rows.double(), *(t.flatten().double() for t in (*mixes, *crops))])


# --- counters -----------------------------------------------------------------------------------


def test_a_plan_is_a_function_of_its_counters() -> None:
    plan = everything(drawn(5))
    assert torch.equal(plan, everything(drawn(5)))
    for other in (drawn(5, seed=1), drawn(5, attempt=1), drawn(4), drawn(5 + 4)):
        assert not torch.equal(plan, everything(other))


@pytest.mark.parametrize("change", [{"seed": 1}, {"attempt": 1}, {"epoch": 1}])
def test_every_draw_of_a_crop_changes_with_its_counters(change: dict[str, int]) -> None:
    first = by_crop(range(4))
    epoch = change.pop("epoch", 0)
    other = by_crop(range(4 * epoch, 4 * epoch + 4), **change)
    same = [torch.equal(first[key], other[key]) for key in first]
    assert first.keys() == other.keys() and not any(same)


def test_no_two_crops_are_drawn_alike() -> None:
    values = {tuple(v[-5:].tolist()) for v in by_crop(range(4)).values()}
    assert len(values) == 23 * 6


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_crop_is_the_same_in_every_batch_size(epoch: int) -> None:
    """Nothing but (epoch, row, view): not the batch's size, nor the row's place in it."""
    expected = by_crop(range(4 * epoch, 4 * epoch + 4), batch=7)
    for batch in (1, 5, 23, 64):
        steps = num_steps(23, batch)
        found = by_crop(range(steps * epoch, steps * epoch + steps), batch=batch)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("num", "batch"), [(23, 7), (21, 7), (5, 8), (1, 1), (2040, 256)])
def test_every_row_comes_once_an_epoch(num: int, batch: int) -> None:
    steps = num_steps(num, batch)
    orders = []
    for epoch in range(2):
        parts = [
            draw(sizes_of(num), [], Counters(0), step=epoch * steps + s, batch_size=batch).rows
            for s in range(steps)
        ]
        assert [len(part) for part in parts[:-1]] == [batch] * (steps - 1)
        assert len(parts[-1]) == num - batch * (steps - 1) > 0
        orders.append(torch.cat(parts).tolist())
        assert sorted(orders[-1]) == list(range(num))
    assert num < 20 or orders[0] != orders[1]


# --- boxes --------------------------------------------------------------------------------------


def boxes(high: int, wide: int, group: ViewGroup, num: int = 2500) -> Tensor:
    words = philox((0, torch.arange(num)[:, None], 0, torch.arange(6)), (high, wide)).flatten(1)
    side = torch.ones(num, dtype=torch.int64)
    return resized_crop_box(words, side * high, side * wide, group)


def torchvision_boxes(high: int, wide: int, group: ViewGroup, num: int = 2500) -> Tensor:
    image = torch.empty(3, high, wide)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(high * 1000 + wide)
        get = RandomResizedCrop.get_params
        return torch.tensor([get(image, [*group.scale], [*group.ratio]) for _ in range(num)])


@pytest.mark.parametrize(
    ("high", "wide", "scale"),
    [
        (300, 200, (0.14, 1.0)),
        (500, 667, (0.05, 0.4)),
        (37, 53, (0.08, 1.0)),
        (1000, 50, (0.01, 1.0)),  # 20:1, where tries fail often
        (64, 640, (0.05, 0.4)),
        (3, 500, (0.08, 1.0)),
        (2, 2, (0.05, 0.4)),
        (1, 1, (0.08, 1.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    high: int, wide: int, scale: tuple[float, float]
) -> None:
    group = ViewGroup(count=1, size=32, scale=scale)
    ours, theirs = boxes(high, wide, group), torchvision_boxes(high, wide, group)
    for measure in range(6):
        samples = []
        for found in (ours, theirs):
            top, left, height, width = found.double().unbind(dim=1)
            measures = (height * width, torch.log(width / height), top, left, height, width)
            samples.append(measures[measure].numpy())
        assert stats.ks_2samp(*samples).pvalue > 0.001, measure
    assert int(ours[:, :2].min()) >= 0 and int(ours[:, 2:].min()) > 0
    assert bool((ours[:, :2] + ours[:, 2:] <= torch.tensor([high, wide])).all())


@pytest.mark.parametrize(
    ("high", "wide"),
    [(3, 500), (500, 3), (1, 9), (101, 67), (67, 100), (8, 2), (2, 8), (7, 6), (2, 3)],
)
def test_the_box_of_last_resort_is_torchvisions(high: int, wide: int) -> None:
    group = ViewGroup(count=1, size=32, scale=(2.0, 2.0))  # never fits
    assert torch.equal(boxes(high, wide, group, 3), torchvision_boxes(high, wide, group, 3))


def box_by_hand(words: list[int], high: int, wide: int, group: ViewGroup) -> list[int]:
    """torchvision's get_params on given words, in Python's own floats."""
    low, most = group.scale
    logs = [math.log(end) for end in group.ratio]
    for area_word, ratio_word in zip(words[0:20:2], words[1:20:2], strict=True):
        area = high * wide * (low + (most - low) * area_word / 2**32)
        middle = ((ratio_word >> 16) + 0.5) / 2**16
        ratio = math.exp(logs[0] + (logs[1] - logs[0]) * middle)
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= wide and 0 < height <= high:
            top, left = words[20] * (high - height + 1), words[21] * (wide - width + 1)
            return [top >> 32, left >> 32, height, width]
    return []


@pytest.mark.parametrize(("high", "wide"), [(500, 667), (53, 37), (40, 160)])
def test_the_first_try_that_fits_is_taken(high: int, wide: int) -> None:
    group = ViewGroup(count=1, size=32, scale=(0.14, 1.0))
    words = philox((0, torch.arange(400)[:, None], 1, torch.arange(6)), (2, 3)).flatten(1)
    side = torch.ones(400, dtype=torch.int64)
    found = resized_crop_box(words, side * high, side * wide, group).tolist()
    by_hand = [box_by_hand(row, high, wide, group) for row in words.tolist()]
    assert sum(bool(box) for box in by_hand) > 300
    assert all(not box or box == one for one, box in zip(found, by_hand, strict=True))


# --- colour -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> GroupPlan:
    plan = draw(sizes_of(3000), [LARGE], Counters(7), step=0, batch_size=3000)
    return plan.groups[0]


def test_factors_are_uniform_in_their_ranges(many: GroupPlan) -> None:
    ranges = (LARGE.brightness, LARGE.contrast, LARGE.saturation, LARGE.hue, LARGE.sigma)
    columns = torch.cat((many.factors, many.sigma[:, None]), dim=1).double().numpy()
    assert many.factors.dtype == many.sigma.dtype == torch.float32
    for column, (low, high) in zip(columns.T, ranges, strict=True):
        assert stats.kstest(column, stats.uniform(low, high - low).cdf).pvalue > 0.001


def test_chances_are_as_asked_and_independent(many: GroupPlan) -> None:
    asked = (LARGE.flip, LARGE.jitter, LARGE.gray, LARGE.blur, LARGE.solarize)
    flags = (many.flip, many.jitter, many.gray, many.blur, many.solarize)
    for probability, flag in zip(asked, flags, strict=True):
        hits = int(flag.sum())
        assert stats.binomtest(hits, flag.numel(), probability).pvalue > 1e-4
    columns = [f.double() for f in flags] + [*many.factors.double().T, many.sigma.double()]
    columns += [*many.crops.origin.T, *many.crops.scale.T, many.order[:, 0].double()]
    r = np.corrcoef(torch.stack(columns).numpy())
    r[10:14, 10:14] = 0  # a box's own four numbers depend on each other
    assert np.abs(r - np.diag(np.diag(r))).max() < 5 / math.sqrt(6000)


def test_all_orders_of_colour_are_equally_likely(many: GroupPlan) -> None:
    orders, counts = many.order.unique(dim=0, return_counts=True)
    assert orders.shape == (24, 4)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders.tolist())
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "wide"),
    [(300, 200), (500, 667), (37, 53), (256, 256), (257, 256), (5, 200), (333, 77), (1, 1)],
)
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (112, 128), (32, 37)])
def test_central_crops_lie_where_torchvision_cuts(
    high: int, wide: int, size: int, resize: int
) -> None:
    resized = functional.resize(torch.zeros(1, high, wide), resize)
    tall, broad = resized.shape[1:]
    places = torch.stack(torch.meshgrid(torch.arange(tall), torch.arange(broad), indexing="ij"))
    corner = functional.center_crop(places, size)[:, 0, 0].double()
    extent = torch.tensor([high, wide]).double()
    scale = extent / torch.tensor([tall, broad])
    one = torch.tensor([0])
    crops = central_crops(one, torch.tensor([high]), torch.tensor([wide]), size=size, resize=resize)
    assert torch.equal(crops.scale[0], scale)
    assert torch.equal(crops.origin[0], corner * scale)
    assert crops.window.tolist() == [[0, 0, high, wide]]
    assert (crops.size, crops.interpolation) == (size, "bicubic")


def test_an_unmixed_plan_is_of_its_crops_alone() -> None:
    """Kernels go by the number of partners, too."""
    group = ViewGroup(count=4, size=8, scale=(0.1, 1.0), mix="cutmix")
    sizes = torch.full((9,), 20), torch.full((9,), 30)
    rows = torch.tensor([8, 1, 5])
    plan = unmixed(sizes, group, Counters(0), rows, view=3, epoch=2)
    assert plan.crops.rows.tolist() == rows.tolist() and plan.partner.tolist() == [0, 1, 2]
    assert plan.box.shape == (3, 4) and plan.weight.tolist() == [1, 1, 1]
