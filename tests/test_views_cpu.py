"""Views on a CPU: the definition's, but for a resize that rounds to 8 bits, as Pillow's does."""

import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import photograph, small_store, store_of
from torch import Tensor

from fastidmm import augment, colour
from fastidmm.batch import Interpolation, Mix, ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels import views_cpu as kernel
from fastidmm.plan import GroupPlan, central_crops, crops_of_boxes, draw
from fastidmm.randaugment import NONE, OPERATIONS
from fastidmm.store import Store

PLAIN = ViewGroup(count=1, size=17, scale=(0.1, 1.0), mean=(0, 0, 0), std=(1, 1, 1))
ALL = replace(
    PLAIN, count=3, jitter=0.8, brightness=(0.2, 1.8), contrast=(0.2, 1.8), saturation=(0.2, 1.8),
    hue=(-0.5, 0.5), gray=0.2, blur=0.5, mix="cutmix",
)  # fmt: skip


def plan_of(store: Store, group: ViewGroup, step: int = 0) -> GroupPlan:
    sizes = store.height, store.width
    plan = draw(sizes, [group], Counters(4), step=step, batch_size=len(store), cutmix_groups=2)
    return plan.groups[0]


def whole(store: Store, group: ViewGroup, **chosen: Any) -> GroupPlan:
    """One crop of each image, the image itself, and nothing done but what is chosen."""
    rows = torch.arange(len(store))
    boxes = torch.stack((0 * rows, 0 * rows, store.height, store.width), dim=1)
    plan = plan_of(store, replace(group, count=1, mix="none"))
    chances = ("flip", "jitter", "gray", "blur", "solarize")
    off: dict[str, Any] = {name: torch.zeros_like(plan.flip) for name in chances}
    crops = crops_of_boxes(rows, boxes, group.size, group.interpolation)
    return replace(plan, **off | chosen, crops=crops)


def squares(size: int, num: int = 4) -> Store:
    """Photographs that no crop of `size` px resizes, the last one gray."""
    images = [photograph(size, size, seed) for seed in range(num)]
    images[-1][:] = images[-1][..., :1]
    return store_of(images)


def alone(plan: GroupPlan, i: int) -> GroupPlan:
    """The plan of one crop, not mixed."""
    one = slice(i, i + 1)

    def cut(part: Any) -> dict[str, Any]:
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        return {key: v[one] for key, v in values.items() if isinstance(v, Tensor)}

    crops = replace(plan.crops, **cut(plan.crops))
    return replace(plan, **{**cut(plan), "crops": crops, "mix": "none"})


def compare(ours: Tensor, theirs: Tensor, *, mean: float, most: float) -> None:
    """Differences in 1/255 of the full range."""
    assert ours.shape == theirs.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    difference = (ours.float() - theirs).abs() * 255
    assert float(difference.mean()) <= mean and float(difference.max()) <= most


def same(store: Store, plan: GroupPlan, group: ViewGroup, most: float = 0.005) -> None:
    """Equal but for the order of sums: for crops that are not resized."""
    ours = kernel.views(store, plan, group, torch.float32)
    compare(ours, augment.render(store, plan, group), mean=most / 5, most=most)


# --- resize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 8, 17, 112])
@pytest.mark.parametrize(("high", "wide"), [(1, 1), (5, 200), (90, 70), (601, 403)])
def test_resizes_are_the_definitions_rounded(
    high: int, wide: int, size: int, interpolation: Interpolation
) -> None:
    """The whole, the last corner, one pixel, a strip of a row: up and down."""
    store = store_of([photograph(7, 5), photograph(high, wide)])
    half, third = max(1, high // 2), max(1, wide // 3)
    boxes = [(0, 0, high, wide), (high - half, wide - third, half, third)]
    boxes += [(high - 1, wide - 1, 1, 1), (high // 2, 0, 1, wide), (0, wide // 2, high, 1)]
    crops = crops_of_boxes(
        torch.ones(5, dtype=torch.int64), torch.tensor(boxes), size, interpolation
    )
    found = kernel.plain_views(store, crops, PLAIN)
    # A cubic passes rounding on by up to 1.3 times.
    most = 1.01 if interpolation == "bilinear" else 1.2
    compare(found, augment.render_plain(store, crops, PLAIN), mean=0.5, most=most)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizes_are_pillows_to_a_level(interpolation: Interpolation) -> None:
    image = photograph(301, 403)
    box = (11, 20, 250, 301)  # top, left, height, width; shrinks across the more
    crops = crops_of_boxes(torch.tensor([0]), torch.tensor([box]), 64, interpolation)
    found = kernel.plain_views(store_of([image]), crops, PLAIN)
    cut = Image.fromarray(image).crop((20, 11, 321, 261))
    way = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
    pillow = torch.from_numpy(np.array(cut.resize((64, 64), way))).permute(2, 0, 1)
    compare(found, pillow[None] / 255, mean=0.01, most=1.001)


@pytest.mark.parametrize(("size", "resize"), [(32, 37), (112, 128), (5, 5)])
def test_evaluations_crops_are_the_definitions_rounded(size: int, resize: int) -> None:
    sides = [(1, 1), (37, 53), (200, 5), (300, 203), (112, 112)]
    store = store_of([photograph(high, wide) for high, wide in sides])
    rows = torch.arange(len(sides))
    crops = central_crops(rows, store.height, store.width, size=size, resize=resize)
    found = kernel.plain_views(store, crops, PLAIN)
    compare(found, augment.render_plain(store, crops, PLAIN), mean=0.5, most=1.2)


def test_a_strip_too_long_to_resize_whole_is_left_to_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = store_of([photograph(40, 50), photograph(6, 50)])
    crops = central_crops(torch.arange(2), store.height, store.width, size=12, resize=14)
    before = kernel.plain_views(store, crops, PLAIN)
    monkeypatch.setattr(kernel, "MOST_PIXELS", 14 * 20)  # one of 14 x 17, the other of 14 x 116
    found = kernel.plain_views(store, crops, PLAIN)
    assert torch.equal(found[0], before[0]) and not torch.equal(found[1], before[1])
    assert torch.allclose(found[1], augment.render_plain(store, crops, PLAIN)[1], atol=1e-6)


def test_pixels_may_lie_anywhere_in_their_memory() -> None:
    store = small_store(5)
    plan = plan_of(store, ALL)
    moved = torch.cat((torch.zeros(7, dtype=torch.uint8), store.pixels))[7:]
    found = kernel.views(replace(store, pixels=moved), plan, ALL, torch.float32)
    assert torch.equal(found, kernel.views(store, plan, ALL, torch.float32))


# --- one operation at a time, on crops that are not resized -------------------------------------

SIZES = pytest.mark.parametrize("size", [1, 8, 17, 112])
ON = torch.ones(4, dtype=torch.bool)


def test_pixels_that_are_not_resized_are_exact() -> None:
    store = squares(9)
    found = kernel.views(store, whole(store, replace(PLAIN, size=9)), PLAIN, torch.float32)
    assert torch.equal(
        (found * 255).round(), torch.stack([store.image(r) for r in range(4)]).permute(0, 3, 1, 2)
    )
    same(store, whole(store, replace(PLAIN, size=9), flip=ON), replace(PLAIN, flip=0.5))


@SIZES
@pytest.mark.parametrize("operation", range(4))
def test_colours_are_the_definitions(size: int, operation: int) -> None:
    """By factors that clamp and that do not, and by none at all."""
    group, store = replace(ALL, size=size), squares(size)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(4, 1)
    for factors in ((0.0, 0.2, 1.0, 1.8), (1.8, 0.5, 0.0, 1.3)):
        chosen = neutral.clone()
        # Turns of the colour circle, both ways and by half of it.
        turns = torch.tensor([-0.5, 0.5, 0.13, -0.2])
        chosen[:, operation] = turns if operation == 3 else torch.tensor(factors)
        same(store, whole(store, group, jitter=ON, factors=chosen), group)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_follows_the_drawn_order(order: tuple[int, ...]) -> None:
    store, group = squares(17), ALL
    factors = torch.tensor(
        [[0.6, 1.7, 1.4, 0.13], [1.8, 0.3, 1.8, -0.2], [1.8, 1.8, 0.2, 0.2], [0.0, 1.8, 1.1, 0.4]]
    )
    chosen = {"jitter": ON, "factors": factors, "order": torch.tensor(order).repeat(4, 1)}
    same(store, whole(store, group, **chosen), group)
    # Gray, blur and solarize then see levels that are gain * value + lift.
    both = {**chosen, "gray": ON, "blur": ON, "sigma": torch.tensor([0.3, 1.0, 1.7, 2.0])}
    same(store, whole(store, group, **both), group, most=0.05)
    group = replace(group, solarize=0.5)
    same(store, whole(store, group, **chosen, solarize=ON), group, most=1)


@SIZES
def test_gray_and_blur_are_the_definitions(size: int) -> None:
    group, store = replace(ALL, size=size, sigma=(0.05, 2.0)), squares(size)
    sigma = torch.tensor([0.05, 0.6, 1.3, 2.0])
    same(store, whole(store, group, gray=ON), group)
    same(store, whole(store, group, blur=ON, sigma=sigma), group, most=0.02)
    same(store, whole(store, group, blur=ON, sigma=sigma, gray=ON), group, most=0.02)


@SIZES
@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.1, 5.0])
def test_a_blur_is_as_wide_as_its_sigma_asks(size: int, sigma: float) -> None:
    """Where the definition reads as far: radii below, at and beyond what one block takes."""
    x = torch.stack([squares(size).image(r) for r in range(4)]).permute(0, 3, 1, 2) / 255
    expected = colour.blur(x, torch.full((4,), sigma), radius=int(-(-4 * sigma // 1)))
    for some in (x[0], x[1, :1]):
        found = kernel.blurred(some.clone(), sigma)
        assert float((found - expected[0 if len(some) == 3 else 1][: len(some)]).abs().max()) < 1e-6


def test_solarize_is_the_definitions_on_levels() -> None:
    group = replace(PLAIN, size=17, solarize=0.5)
    same(squares(17), whole(squares(17), group, solarize=ON), group)


@pytest.mark.parametrize("name", OPERATIONS)
def test_randaugment_sees_the_finished_crop_before_its_flip(name: str) -> None:
    """On pictures of 8 bits, so that tables of 256 levels see the same ones."""
    store, group = squares(33), replace(PLAIN, size=33, randaugment=2)
    operation = torch.tensor([OPERATIONS.index(name), NONE]).repeat(4, 1)
    flip = torch.tensor([True, False, True, True])
    same(store, whole(store, group, operation=operation, flip=flip), group)


# --- the whole chain ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 17, 112])
def test_the_whole_chain_stays_near_the_definition(size: int) -> None:
    """Brightness, contrast and saturation by up to 1.8 each make of one level up to 5.8."""
    store, group = small_store(9), replace(ALL, size=size)
    for step in range(2):
        plan = plan_of(store, group, step)
        ours = kernel.views(store, plan, group, torch.float32)
        compare(ours, augment.render(store, plan, group), mean=0.5, most=7)


def test_views_are_normalised_in_the_type_and_layout_asked_for() -> None:
    group = replace(ALL, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    store = squares(17)
    plan = whole(store, group, blur=ON)
    full = kernel.views(store, plan, group, torch.float32)
    expected = augment.render(store, plan, group)
    assert float((full - expected).abs().max()) < 1e-4
    for dtype in (torch.bfloat16, torch.float16):
        half = kernel.views(store, plan, group, dtype)
        assert half.dtype == dtype and half.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("mix", ["none", "cutmix", "mixup"])
def test_no_crop_gives_no_view(mix: Mix) -> None:
    store, group = small_store(3), replace(ALL, mix=mix)
    plan = alone(plan_of(store, group), 9)  # of none
    found = kernel.views(store, replace(plan, mix=mix), group, torch.bfloat16)
    assert found.shape == (0, 3, 17, 17) and found.dtype == torch.bfloat16
    assert kernel.plain_views(store, plan.crops, group).shape == (0, 3, 17, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_crop_is_the_same_bits_whatever_it_is_rendered_with(dtype: torch.dtype) -> None:
    """Kills, micro-batches and the report need it: one by one, and in a batch."""
    store = store_of([photograph(20 + 7 * r % 31, 24 + 11 * r % 29, r) for r in range(8)])
    group = replace(ALL, size=33, solarize=0.3, randaugment=2, mix="none")
    plan = plan_of(store, group)
    batch = kernel.views(store, plan, group, dtype)
    assert torch.equal(batch, kernel.views(store, plan, group, dtype))
    for i in range(len(batch)):
        assert torch.equal(kernel.views(store, alone(plan, i), group, dtype)[0], batch[i])


def test_one_thread_renders_and_the_number_of_threads_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, seen = small_store(3), []
    plan = plan_of(store, ALL)
    expected = kernel.views(store, plan, ALL, torch.float32)
    before, resized = torch.get_num_threads(), kernel.resized

    def spied(*given: Any) -> Tensor:
        seen.append(torch.get_num_threads())
        return resized(*given)

    monkeypatch.setattr(kernel, "resized", spied)
    try:
        torch.set_num_threads(2)
        assert torch.equal(kernel.views(store, plan, ALL, torch.float32), expected)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            kernel.plain_views(store, replace(plan.crops, rows=plan.crops.rows + 3), ALL)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- mixing -------------------------------------------------------------------------------------

BOXES = [[0, 0, 17, 17], [3, 2, 9, 17], [5, 5, 5, 9], [16, 16, 17, 17], [0, 0, 0, 0], [2, 0, 4, 8]]


@pytest.mark.parametrize("partner", [[1, 2, 3, 4, 5, 0], [1, 0, 2, 3, 5, 4], [3, 4, 5, 3, 4, 5]])
def test_cutmix_pastes_finished_crops(partner: list[int]) -> None:
    """In cycles, in pairs, of itself; and as the report asks, where several paste one."""
    store = small_store(6)
    group = replace(ALL, count=1)
    plan = replace(plan_of(store, group), partner=torch.tensor(partner), box=torch.tensor(BOXES))
    single = kernel.views(store, replace(plan, mix="none"), group, torch.bfloat16)
    expected = single.clone()
    for i, (top, left, bottom, right) in enumerate(BOXES):
        expected[i, :, top:bottom, left:right] = single[partner[i], :, top:bottom, left:right]
    assert torch.equal(kernel.views(store, plan, group, torch.bfloat16), expected)


def test_mixup_blends_before_it_rounds() -> None:
    store, group = small_store(6), replace(ALL, mix="mixup")
    plan = replace(plan_of(store, group), weight=torch.linspace(0.5, 1, 18))
    single = kernel.views(store, replace(plan, mix="none"), group, torch.float32).double()
    weight = plan.weight.double()[:, None, None, None]
    expected = weight * single + (1 - weight) * single[plan.partner]
    full = kernel.views(store, plan, group, torch.float32)
    assert float((full - expected).abs().max()) < 1e-6
    half = kernel.views(store, plan, group, torch.bfloat16)
    assert torch.equal(half, full.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)
