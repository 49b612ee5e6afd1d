"""Views against torchvision on PIL images: the same parameters, the same picture to 8 bits."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from synthetic import Photograph, photograph, small_store, store_of
from torch import Tensor
from torchvision.transforms import InterpolationMode, functional

from fastidmm import augment, colour
from fastidmm.batch import IMAGENET_MEAN, IMAGENET_STD, Interpolation, ViewGroup
from fastidmm.chance import Counters
from fastidmm.plan import Crops, GroupPlan, central_crops, crops_of_boxes, draw
from fastidmm.randaugment import FAMILIES, NONE, OPERATIONS, randaugment
from fastidmm.store import Store

MODES: dict[Interpolation, InterpolationMode] = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
SIZES = [(37, 53), (300, 200), (1, 1), (5, 200), (112, 112)]
PLAIN = ViewGroup(count=1, size=32, scale=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
CHAIN = ViewGroup(
    count=3,
    size=33,
    scale=(0.1, 1.0),
    jitter=0.8,
    brightness=(0.2, 1.8),
    contrast=(0.2, 1.8),
    saturation=(0.2, 1.8),
    hue=(-0.2, 0.2),
    gray=0.2,
    blur=0.5,
    solarize=0.3,
    randaugment=2,
    mix="cutmix",
)


def tensor_of(image: Photograph | Image.Image) -> Tensor:
    """One picture as (1, 3, h, w) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def agree(ours: Tensor, theirs: Tensor) -> None:
    """Equal to 8 bits: 1/255 on average, 4/255 at worst."""
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs() * 255
    assert float(difference.mean()) <= 1 and float(difference.max()) <= 4


def one(value: float) -> Tensor:
    return torch.tensor([value])


# --- resized crop -------------------------------------------------------------------------------


def boxes_in(high: int, wide: int) -> list[tuple[int, int, int, int]]:
    """Top, left, height, width: the whole, the last corner, one pixel, a strip, the middle."""
    half, third = max(1, high // 2), max(1, wide // 3)
    return [
        (0, 0, high, wide),
        (high - half, wide - third, half, third),
        (high - 1, wide - 1, 1, 1),
        (high // 2, 0, 1, wide),
        (high // 4, wide // 4, half, max(1, wide // 2)),
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [17, 112])
@pytest.mark.parametrize(("high", "wide"), SIZES)
def test_resized_crops_are_pillows(
    high: int, wide: int, size: int, interpolation: Interpolation
) -> None:
    image = photograph(high, wide)
    boxes = boxes_in(high, wide)
    rows = torch.zeros(len(boxes), dtype=torch.int64)
    crops = crops_of_boxes(rows, torch.tensor(boxes), size, interpolation)
    ours = augment.render_plain(store_of([image]), crops, PLAIN)
    for found, (top, left, height, width) in zip(ours, boxes, strict=True):
        mode = MODES[interpolation]
        whole = Image.fromarray(image)
        # Pillow 13 begins with the axis that shrinks more, all before with the width: two calls
        # settle it.
        across = functional.resized_crop(whole, top, left, height, width, [height, size], mode)
        pillow = functional.resize(across, [size, size], mode)
        agree(found[None], tensor_of(pillow))
        cut = tensor_of(image)[:, :, top : top + height, left : left + width].double()
        for shape in ((height, size), (size, size)):
            cut = torch.nn.functional.interpolate(cut, shape, mode=interpolation, antialias=True)
            cut = cut.clamp(0, 1)
        assert float((found - cut[0]).abs().max()) < 1e-5


@pytest.mark.parametrize(("high", "wide"), [*SIZES, (500, 333)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 37)])
def test_evaluation_is_resize_and_center_crop(high: int, wide: int, size: int, resize: int) -> None:
    image = photograph(high, wide, seed=3)
    rows, sides = torch.tensor([0]), (torch.tensor([high]), torch.tensor([wide]))
    group = replace(PLAIN, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    crops = central_crops(rows, *sides, size=size, resize=resize)
    ours = augment.render_plain(store_of([image]), crops, group)
    resized = functional.resize(Image.fromarray(image), resize, InterpolationMode.BICUBIC)
    pillow = tensor_of(functional.center_crop(resized, size))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(
        colour.normalise(pillow, group), functional.normalize(pillow, IMAGENET_MEAN, IMAGENET_STD)
    )
    agree(ours * std + mean, pillow)


# --- one operation at a time --------------------------------------------------------------------


@pytest.fixture(params=[(37, 53), (48, 48), (1, 1), (5, 200)])
def image(request: pytest.FixtureRequest) -> Image.Image:
    high, wide = request.param
    return Image.fromarray(photograph(high, wide, 5))


def test_flip_mirrors(image: Image.Image) -> None:
    assert torch.equal(colour.flip(tensor_of(image)), tensor_of(functional.hflip(image)))


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.8])
def test_blends_are_pillows(image: Image.Image, factor: float) -> None:
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    )
    for operation, theirs in enumerate(adjust):
        ours = colour.blend(tensor_of(image), torch.tensor([operation]), one(factor))
        agree(ours, tensor_of(theirs(image, factor)))


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.07, 0.2])
def test_hue_is_torchvisions_in_float(image: Image.Image, turns: float) -> None:
    x = tensor_of(image)
    ours = colour.shift_hue(x, one(turns))
    theirs = functional.adjust_hue(x, turns)
    agree(ours, theirs)
    assert float((ours - theirs).abs().max()) < 1e-4
    assert torch.allclose(ours.amax(1), x.amax(1)) and torch.allclose(ours.amin(1), x.amin(1))


def test_hue_keeps_grays_and_turns_primaries() -> None:
    x = torch.tensor([[0.5, 0.5, 0.5], [0, 0, 0], [1, 0, 0], [0, 0.5, 1]])[:, :, None, None]
    turned = colour.shift_hue(x, torch.full((4,), 1 / 3))[:, :, 0, 0]
    expected = torch.tensor([[0.5, 0.5, 0.5], [0, 0, 0], [0, 1, 0], [1, 0, 0.5]])
    assert torch.allclose(turned, expected, atol=1e-6)


def test_gray_is_pillows(image: Image.Image) -> None:
    agree(colour.grayscale(tensor_of(image)), tensor_of(functional.to_grayscale(image, 3)))


def test_solarize_is_pillows(image: Image.Image) -> None:
    ours = colour.solarize(tensor_of(image))
    assert torch.allclose(ours, tensor_of(functional.solarize(image, 128)), atol=1e-6)
    levels = torch.arange(256.0).mul(1 / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    inverted = (colour.solarize(levels) != levels)[0, 0].flatten()
    assert inverted.nonzero()[:, 0].tolist() == list(range(128, 256))


@pytest.mark.parametrize("size", [1, 3, 37, 112])
@pytest.mark.parametrize("sigma", [0.1, 0.33, 1.0, 2.0])
def test_blur_is_a_gaussian(size: int, sigma: float) -> None:
    x = tensor_of(photograph(size, size, seed=6))
    ours = colour.blur(x.repeat(2, 1, 1, 1), torch.tensor([sigma, 0.5]), radius=8)[:1]
    exact = x.double().numpy()
    for axis in (2, 3):
        exact = gaussian_filter1d(exact, sigma, axis=axis, mode="nearest", truncate=6)
    assert float((ours - torch.from_numpy(exact)).abs().max()) < 5e-5


# --- the chain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_follows_the_drawn_order(order: tuple[int, ...]) -> None:
    """Each operation at its place, contrast's mean taken there: torchvision's own, one by one."""
    factors = (0.6, 1.7, 1.4, 0.13)
    x = tensor_of(photograph(37, 53, seed=7))
    ours = colour.jitter(x.clone(), torch.tensor([order]), torch.tensor([factors]))
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    theirs = x
    for operation in order:
        theirs = adjust[operation](theirs, factors[operation])
    assert float((ours - theirs).abs().max()) < 1e-3


def drawn(store: Store, group: ViewGroup = CHAIN) -> GroupPlan:
    sizes = store.height, store.width
    plan = draw(sizes, [group], Counters(4), step=0, batch_size=len(store), cutmix_groups=2)
    return plan.groups[0]


def randaugmented(x: Tensor, plan: GroupPlan, i: int) -> Tensor:
    """RandAugment's operations of one crop; test_randaugment.py holds them against Pillow's."""
    drawn = plan.operation, plan.level, plan.negative, plan.spot
    return randaugment(x.clone(), *(each[i : i + 1] for each in drawn))


def test_render_does_the_whole_chain_in_order() -> None:
    """Every crop by torchvision's operations on floats, in the published order."""
    store, group = small_store(9), replace(CHAIN, mix="none")
    plan = drawn(store, group)
    # Those that are tables round: a last bit before them can move many pixels by a level.
    tables = torch.isin(plan.operation, torch.tensor([OPERATIONS.index(n) for n in FAMILIES[0][0]]))
    plan = replace(plan, operation=torch.where(tables, NONE, plan.operation))
    ours = augment.render(store, plan, group)
    for i in range(27):
        crops = Crops(
            plan.crops.rows[i : i + 1],
            plan.crops.origin[i : i + 1],
            plan.crops.scale[i : i + 1],
            plan.crops.window[i : i + 1],
            group.size,
            group.interpolation,
        )
        x = augment.render_plain(store, crops, PLAIN)
        if plan.jitter[i]:
            for operation in plan.order[i].tolist():
                name = ("brightness", "contrast", "saturation", "hue")[operation]
                factor = float(plan.factors[i, operation])
                x = getattr(functional, f"adjust_{name}")(x, factor)
        x = functional.rgb_to_grayscale(x, 3) if plan.gray[i] else x
        if plan.blur[i]:
            blurred = x.double().numpy()
            for axis in (2, 3):
                blurred = gaussian_filter1d(
                    blurred, float(plan.sigma[i]), axis=axis, mode="nearest", truncate=6
                )
            x = torch.from_numpy(blurred).float()
        x = torch.where(x >= 128 / 255, 1 - x, x) if plan.solarize[i] else x
        x = randaugmented(x, plan, i)
        x = functional.hflip(x) if plan.flip[i] else x
        x = functional.normalize(x, IMAGENET_MEAN, IMAGENET_STD)
        # A value beside the threshold of solarize may fall on its other side.
        apart = ((ours[i] - x[0]).abs() > 0.01).float().mean()
        assert float(apart) < (0.003 if plan.solarize[i] else 1e-9)


def test_render_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = small_store(20)
    plan = drawn(store)
    whole = augment.render(store, plan, CHAIN)
    for size in (1, 7):
        monkeypatch.setattr(augment, "CPU_CHUNK", size)
        assert float((augment.render(store, plan, CHAIN) - whole).abs().max()) < 1e-5


def test_the_way_of_a_gpu_gives_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded windows and `torch.where`, taken here on the CPU."""
    store = small_store(20)
    plan = drawn(store)
    sides = store.height, store.width
    central = central_crops(torch.arange(20), *sides, size=32, resize=37)
    ways = []
    for gpu in (False, True):
        monkeypatch.setattr(colour, "on_gpu", lambda x, gpu=gpu: gpu)
        views = augment.render(store, plan, CHAIN)
        ways.append((views, augment.render_plain(store, central, CHAIN)))
    for cpu, gpu_way in zip(*ways, strict=True):
        assert float((cpu - gpu_way).abs().max()) < 1e-5


@pytest.mark.parametrize("row", range(7))
def test_padded_windows_begin_with_the_window(row: int) -> None:
    store = small_store(7)
    image = store.image(row)
    high, wide = image.shape[:2]
    box = torch.tensor([[high // 3, wide // 4, high - high // 3, wide - wide // 4]])
    crops = crops_of_boxes(torch.tensor([row]), box, 8, "bilinear")
    padded = augment._padded_windows(store, crops, store.max_height, store.max_width)
    assert padded.shape == (1, store.max_height, store.max_width, 3)
    window = image[high // 3 :, wide // 4 :]
    assert torch.equal(padded[0, : window.shape[0], : window.shape[1]], window)


def test_cutmix_by_hand() -> None:
    x = torch.arange(3.0)[:, None, None, None].expand(3, 3, 5, 5)
    plan = replace(
        drawn(small_store(1), replace(CHAIN, size=5)),
        partner=torch.tensor([1, 2, 0]),
        box=torch.tensor([[0, 0, 2, 3], [1, 4, 5, 5], [2, 2, 2, 4]]),
    )
    expected = x.clone()
    expected[0, :, 0:2, 0:3] = 1
    expected[1, :, 1:5, 4:5] = 2
    assert torch.equal(augment.cutmix(x, plan), expected)


def test_render_mixes_finished_crops() -> None:
    store = small_store(6)
    plan = drawn(store)
    alone = augment.render(store, replace(plan, mix="none"), CHAIN)
    mixed = augment.render(store, plan, CHAIN)
    for i, (top, left, bottom, right) in enumerate(plan.box.tolist()):
        expected = alone[i].clone()
        expected[:, top:bottom, left:right] = alone[plan.partner[i], :, top:bottom, left:right]
        assert torch.equal(mixed[i], expected)


def test_mixup_blends_finished_crops() -> None:
    store, group = small_store(6), replace(CHAIN, mix="mixup")
    plan = drawn(store, group)
    alone = augment.render(store, replace(plan, mix="none"), group).double()
    mixed = augment.render(store, plan, group)
    assert bool((plan.weight < 1).any())
    for i, weight in enumerate(plan.weight.double()):
        expected = weight * alone[i] + (1 - weight) * alone[plan.partner[i]]
        assert float((mixed[i] - expected).abs().max()) < 1e-5
