"""The kernels of `views` in Triton's interpreter, against the plain renderer."""

from dataclasses import replace

import pytest
import torch
from synthetic import photograph, store_of
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from fastidmm import augment
from fastidmm.batch import Interpolation, ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels import views as kernel
from fastidmm.kernels import views_cpu
from fastidmm.plan import GroupPlan, central_crops, crops_of_boxes, draw
from fastidmm.randaugment import FAMILIES, NONE, OPERATIONS
from fastidmm.store import Store

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests/gpu/ runs them compiled"),
    # The interpreter computes lanes that are masked, whatever they hold.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
PLAIN = ViewGroup(count=1, size=16, scale=(0.1, 1.0), mean=(0, 0, 0), std=(1, 1, 1))
ALL = replace(
    PLAIN, count=2, jitter=0.8, brightness=(0.2, 1.8), contrast=(0.2, 1.8), saturation=(0.2, 1.8),
    hue=(-0.2, 0.2), gray=0.2, blur=0.5, solarize=0.2, mix="cutmix",
)  # fmt: skip


TABLES = FAMILIES[0][0]


def photographs(num: int = 3) -> Store:
    return store_of([photograph(20 + 17 * r % 31, 24 + 11 * r % 29, r) for r in range(num)])


def plan_of(store: Store, group: ViewGroup, step: int = 0) -> GroupPlan:
    sizes = store.height, store.width
    return draw(sizes, [group], Counters(4), step=step, batch_size=len(store)).groups[0]


def compare(ours: Tensor, theirs: Tensor, *, mean: float, most: float) -> None:
    """Differences in 1/255 of the full range."""
    assert ours.shape == theirs.shape
    assert ours.is_contiguous(memory_format=torch.channels_last)
    difference = (ours.float() - theirs).abs() * 255
    assert float(difference.mean()) <= mean and float(difference.max()) <= most


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("high", "wide", "size"), [(1, 1, 16), (5, 90, 17), (90, 70, 21)])
def test_resizes_are_the_renderers(
    high: int, wide: int, size: int, interpolation: Interpolation
) -> None:
    """Pictures without hard edges, since a bicubic resize is clamped elsewhere."""
    smooth = (photograph(high, wide) // 4 + 90).astype("uint8")
    store = store_of([photograph(7, 5), smooth])
    boxes = torch.tensor([[0, 0, high, wide], [high // 2, wide // 3, high - high // 2, 1]])
    crops = crops_of_boxes(torch.tensor([1, 1]), boxes, size, interpolation)
    ours = kernel.resize(store, crops, torch.float32).permute(0, 3, 1, 2)
    compare(ours, augment.render_plain(store, crops, PLAIN), mean=0.05, most=0.25)


def test_a_crop_wider_than_a_program_is_cut_into_columns() -> None:
    store = store_of([photograph(9, 300)])
    group = replace(ALL, count=1, size=130, blur=1.0, sigma=(0.5, 1.0), mix="none")
    plan = plan_of(store, group)
    assert kernel._blocks(130, 4) == (64, 128)
    ours = kernel.fused(store, plan, group, torch.float32)
    compare(ours, augment.render(store, plan, group), mean=0.1, most=1)


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("step", [0, 1])
def test_the_whole_chain_is_the_renderers(size: int, step: int) -> None:
    store, group = photographs(), replace(ALL, size=size)
    plan = plan_of(store, group, step)
    solarized = plan.solarize.nonzero()[:, 0]
    assert len(solarized) < 6 and bool(plan.blur.any()) and not bool(plan.blur.all())
    ours = kernel.fused(store, plan, group, torch.float32)
    theirs = augment.render(store, plan, group)
    # A value beside the threshold of solarize may fall on its other side.
    touched = [i for i in range(6) if i in solarized or int(plan.partner[i]) in solarized]
    compare(ours, theirs, mean=0.3, most=255)
    rest = [i for i in range(6) if i not in touched]
    compare(ours[rest], theirs[rest], mean=0.1, most=0.6)


def opposite() -> tuple[Store, GroupPlan, ViewGroup]:
    """Two crops, each other's partners, of opposite jitter, blur and flip; boxes in the middle."""
    store, group = photographs(2), replace(ALL, count=1, size=33)
    plan = replace(
        plan_of(store, group),
        jitter=torch.tensor([True, True]),
        order=torch.tensor([[1, 3, 0, 2], [0, 2, 3, 1]]),
        factors=torch.tensor([[0.4, 1.7, 0.3, 0.15], [1.6, 0.5, 1.8, -0.2]]),
        gray=torch.tensor([False, True]),
        blur=torch.tensor([True, False]),
        sigma=torch.tensor([1.9, 0.1]),
        solarize=torch.tensor([False, False]),
        flip=torch.tensor([False, True]),
        partner=torch.tensor([1, 0]),
        box=torch.tensor([[5, 9, 20, 24], [0, 14, 33, 19]]),
    )
    return store, plan, group


def test_two_opposite_crops_that_paste_each_other() -> None:
    store, plan, group = opposite()
    ours = kernel.fused(store, plan, group, torch.float32)
    compare(ours, augment.render(store, plan, group), mean=0.1, most=0.6)


def test_solarize_inverts_from_128_on() -> None:
    """All but values beside the threshold, which may fall on its other side."""
    store, plan, group = opposite()
    plan = replace(plan, solarize=torch.tensor([True, True]), blur=torch.tensor([False, False]))
    ours = kernel.fused(store, plan, group, torch.float32)
    theirs = augment.render(store, plan, group)
    apart = (ours - theirs).abs() > 1 / 255
    assert float(apart.float().mean()) < 0.01
    solid = augment.render(store, replace(plan, solarize=~plan.solarize), group)
    assert float((solid != theirs).float().mean()) > 0.1


def test_every_pixel_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into memory full of NaN: none is left, whatever the boxes are."""
    store, plan, group = opposite()
    new = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: new(*a, **k).fill_(torch.nan))
    for box in ([[0, 0, 33, 33], [0, 0, 0, 0]], [[32, 32, 33, 33], [0, 0, 17, 33]]):
        some = replace(plan, box=torch.tensor(box))
        ours = kernel.fused(store, some, group, torch.float32)
        assert not bool(ours.isnan().any())
        compare(ours, augment.render(store, some, group), mean=0.1, most=0.6)


def test_normalised_views_in_half_precision() -> None:
    store, plan, group = opposite()
    group = replace(group, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    theirs = augment.render(store, plan, group)
    ours = kernel.fused(store, plan, group, torch.float16)
    assert ours.dtype == torch.float16
    compare(ours * 0.226, theirs * 0.226, mean=0.1, most=1)


def test_blended_crops_are_the_renderers() -> None:
    """Each with its own flip and solarize, in its own share."""
    store, plan, group = opposite()
    group = replace(group, blur=0.0, mix="mixup")
    halves = torch.tensor([0.3, 0.8])
    plan = replace(plan, mix="mixup", weight=halves, blur=torch.zeros_like(plan.blur))
    assert kernel.fusible(plan, group)
    ours = kernel.fused(store, plan, group, torch.float32)
    compare(ours, augment.render(store, plan, group), mean=0.1, most=0.6)
    plan = replace(plan, solarize=torch.tensor([True, False]))
    ours = kernel.fused(store, plan, group, torch.float32)
    apart = (ours - augment.render(store, plan, group)).abs() > 1 / 255
    assert float(apart.float().mean()) < 0.01


def test_gray_without_jitter_is_the_renderers() -> None:
    store, plan, group = opposite()
    plan = replace(plan, jitter=torch.zeros_like(plan.jitter))
    ours = kernel.fused(store, plan, replace(group, jitter=0.0), torch.float32)
    theirs = augment.render(store, plan, replace(group, jitter=0.0))
    compare(ours, theirs, mean=0.1, most=0.6)
    assert bool((ours != kernel.fused(store, plan, PLAIN, torch.float32)).any())


def test_what_is_partly_fused_is_the_renderers_too() -> None:
    """RandAugment's tables may move a pixel by a level; a mixed crop shows two."""
    store = photographs()
    group = replace(ALL, mix="alternate", randaugment=2)
    for step in (0, 1):
        plan = plan_of(store, group, step)
        tables = torch.isin(plan.operation, torch.tensor([OPERATIONS.index(n) for n in TABLES]))
        plan = replace(plan, operation=torch.where(tables, NONE, plan.operation))
        plan = replace(plan, solarize=torch.zeros_like(plan.solarize))
        ours = kernel.fused(store, plan, group, torch.float32)
        compare(ours, augment.render(store, plan, group), mean=0.1, most=0.6)


@pytest.mark.parametrize("step", [0, 1])
def test_fine_tunings_views_are_the_renderers(step: int) -> None:
    """Mixup in one epoch, CutMix in the other; tables may move a pixel by a level."""
    store = photographs()
    group = replace(ALL, size=33, blur=0.0, solarize=0.0, mix="alternate", randaugment=2)
    plan = plan_of(store, group, step)
    tables = torch.isin(plan.operation, torch.tensor([OPERATIONS.index(n) for n in TABLES]))
    assert bool(tables.any()) and kernel.fusible(plan, group)
    ours, theirs = (
        kernel.fused(store, plan, group, torch.float32),
        augment.render(store, plan, group),
    )
    compare(ours, theirs, mean=0.3, most=255)
    plan = replace(plan, operation=torch.where(tables, NONE, plan.operation))
    ours, theirs = (
        kernel.fused(store, plan, group, torch.float32),
        augment.render(store, plan, group),
    )
    compare(ours, theirs, mean=0.1, most=0.6)


def test_a_cpu_has_renderers_of_its_own() -> None:
    """Which `test_views_cpu.py` holds against the definition."""
    store, plan, group = opposite()
    found = kernel.views(store, plan, group, torch.bfloat16)
    assert torch.equal(found, views_cpu.views(store, plan, group, torch.bfloat16))
    crops = central_crops(torch.arange(2), store.height, store.width, size=16, resize=18)
    found = kernel.plain_views(store, crops, PLAIN)
    assert torch.equal(found, views_cpu.plain_views(store, crops, PLAIN))


def test_the_reference_is_the_plain_renderer() -> None:
    store, plan, group = opposite()
    found = kernel.reference(store, plan, group, torch.bfloat16)
    assert torch.equal(found, augment.render(store, plan, group).bfloat16())
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_what_the_kernels_do_not_know_is_left_to_the_renderer() -> None:
    store = photographs()
    for group, known in (
        (ALL, True),
        (replace(ALL, mix="none"), True),
        (replace(ALL, mix="mixup"), False),
        (replace(ALL, mix="mixup", blur=0.0), True),
        (replace(ALL, randaugment=2), False),
        (replace(ALL, randaugment=2, blur=0.0), False),
        (replace(ALL, randaugment=2, blur=0.0, solarize=0.0), True),
        (replace(ALL, sigma=(0.1, 2.1)), False),
        (replace(ALL, sigma=(0.1, 2.1), blur=0.0), True),
    ):
        assert kernel.fusible(plan_of(store, group), group) == known
