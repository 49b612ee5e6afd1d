"""What only a GPU can show: plans and views equal to the CPU's, steps that never wait."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from fastidmm import evaluate
from fastidmm.augment import render, render_plain
from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels.draws import fused, reference
from fastidmm.kernels.randaugment import fused as fused_operations
from fastidmm.kernels.views import plain_views, views
from fastidmm.loaders.memory import Tier, place
from fastidmm.plan import GroupPlan, central_crops, draw
from fastidmm.randaugment import randaugment
from fastidmm.store import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda", 0)
GROUP = ViewGroup(
    count=2, size=33, scale=(0.05, 1.0), jitter=0.8, brightness=(0.2, 1.8), contrast=(0.2, 1.8),
    saturation=(0.2, 1.8), hue=(-0.2, 0.2), gray=0.2, blur=0.5, solarize=0.2, mix="cutmix",
)  # fmt: skip
BATCH = 16  # of views by kernels
TUNING = replace(GROUP, interpolation="bicubic", randaugment=2, mix="alternate")
# What the kernels know together: the paper's fine-tuning.
KNOWN = replace(TUNING, blur=0.0, solarize=0.0)


def store(num: int = 37) -> Store:
    """Noise of awkward sizes."""
    chance = torch.Generator().manual_seed(0)
    height = torch.randint(5, 90, (num,), generator=chance).int()
    width = torch.randint(5, 90, (num,), generator=chance).int()
    length = height.long() * width.long() * 3
    pixels = torch.randint(0, 256, (int(length.sum()),), generator=chance, dtype=torch.uint8)
    label = torch.zeros(num, dtype=torch.int64)
    return Store(pixels, length.cumsum(0) - length, height, width, label, ("one",), "noise")


def plan(photos: Store, step: int, group: ViewGroup = GROUP, num: int = 16) -> GroupPlan:
    """One group's plan, drawn where the store lies."""
    sizes = (photos.height, photos.width)
    return draw(sizes, [group], Counters(7), step=step, batch_size=num, cutmix_groups=3).groups[0]


def tensors(thing: object) -> dict[str, torch.Tensor]:
    """All tensors of a plan, by name, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for field in dataclasses.fields(thing):  # type: ignore[arg-type]
        value = getattr(thing, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value.cpu()
        elif dataclasses.is_dataclass(value):
            found |= tensors(value)
    return found


@pytest.mark.parametrize("group", [GROUP, TUNING], ids=["pretraining", "fine-tuning"])
@pytest.mark.parametrize("step", range(6))
def test_plans_are_equal_to_the_bit(step: int, group: ViewGroup) -> None:
    photos = store()
    there = tensors(plan(photos.to(torch.device("cuda")), step, group))
    here = tensors(plan(photos, step, group))
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), name


@pytest.mark.parametrize("part", range(3))
def test_three_million_crops_are_drawn_alike(part: int) -> None:
    """One kernel on the GPU, the definition on the CPU."""
    num, group = 1_000_000, TUNING
    crops = torch.arange(part * num, (part + 1) * num)
    views, places = crops % 6, crops // 6 % 5000
    chance = torch.Generator().manual_seed(part)
    sizes = [torch.randint(1, 4000, (5000,), generator=chance).int() for _ in range(2)]
    counters = Counters(2**31 + part, part)
    here = reference(group, places, views, (sizes[0], sizes[1]), counters, part)
    there = fused(
        group, places.cuda(), views.cuda(), (sizes[0].cuda(), sizes[1].cuda()), counters, part
    )
    for name, expected in here.items():
        assert torch.equal(there[name].cpu(), expected), name


def test_views_are_equal_to_rounding() -> None:
    photos = store()
    there = photos.to(torch.device("cuda"))
    mine = render(photos, plan(photos, 1), GROUP)
    theirs = render(there, plan(there, 1), GROUP).cpu()
    # Solarize may fall on either side of its threshold in a last bit.
    assert (mine - theirs).abs().gt(1e-3).float().mean() < 1e-4


@pytest.mark.parametrize("size", [33, 112, 224])
@pytest.mark.parametrize("group", [GROUP, KNOWN], ids=["pretraining", "fine-tuning"])
def test_the_kernels_give_the_renderers_views(group: ViewGroup, size: int) -> None:
    """1/255 on average; twice the same bits."""
    there = store().to(torch.device("cuda"))
    for step in (0, -(-37 // BATCH)):  # of the first epoch and the second
        group = replace(group, size=size)
        drawn = plan(there, step, group, BATCH)
        assert drawn.mix == ("mixup" if group.mix == "alternate" and not step else "cutmix")
        ours = views(there, drawn, group, torch.float32)
        theirs = render(there, drawn, group)
        assert float((ours - theirs).abs().mean() * 255 * 0.226) <= 1
        assert torch.equal(ours, views(there, drawn, group, torch.float32))
        half = views(there, drawn, group, torch.bfloat16)
        assert half.is_contiguous(memory_format=torch.channels_last)
        # A value on either side of solarize's threshold is 1/255 off: 0.0175 of a normalised view.
        # RandAugment rounds to levels, and may spread two of them.
        apart = ((half.float() - ours).abs() > 0.03).float().mean()
        assert float(apart) <= (0.05 if group.randaugment else 0)


def test_plain_views_are_the_renderers() -> None:
    there = store().to(torch.device("cuda"))
    rows = torch.arange(37, device="cuda")
    crops = central_crops(rows, there.height, there.width, size=56, resize=64)
    difference = plain_views(there, crops, GROUP) - render_plain(there, crops, GROUP)
    assert float(difference.abs().mean() * 255 * 0.226) <= 1


def test_randaugment_is_the_cpus_on_pictures_of_8_bits() -> None:
    """Every operation, level and sign; tables and nearest pixels to the bit."""
    chance = torch.Generator().manual_seed(1)
    kinds = torch.cartesian_prod(torch.arange(16), torch.arange(1, 10), torch.arange(2))
    x = torch.randint(0, 256, (len(kinds), 3, 37, 37), generator=chance).float() / 255
    spot = torch.randint(0, 37, (len(kinds), 1, 2), generator=chance)
    drawn = kinds[:, :1], kinds[:, 1:2], kinds[:, 2:].bool(), spot
    mine = randaugment(x.clone(), *drawn)
    there = tuple(each.cuda() for each in drawn)
    theirs = randaugment(x.cuda(), *there).cpu()
    assert float((mine - theirs).abs().max()) < 1e-6
    kernels = fused_operations(x.permute(0, 2, 3, 1).contiguous().cuda(), *there).cpu()
    assert float((mine.permute(0, 2, 3, 1) - kernels).abs().max()) < 1e-5


def test_drawing_and_rendering_never_wait() -> None:
    photos = store().to(torch.device("cuda"))
    render(photos, plan(photos, 0), GROUP)  # tables are made once
    render(photos, plan(photos, 0, TUNING), TUNING)
    for group in (GROUP, TUNING, KNOWN):  # and programs compiled
        views(photos, plan(photos, 0, group), group, torch.bfloat16)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(1, 4):
            for group in (GROUP, TUNING, KNOWN):
                render(photos, plan(photos, step, group), group)
                views(photos, plan(photos, step, group), group, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pinned_pixels_of_the_host_give_the_same_bits() -> None:
    photos = store()
    near, far = place(photos, CUDA, "device"), place(photos, CUDA, "host")
    assert near.pixels.is_cuda and far.pixels.is_pinned() and far.device == near.device
    drawn = plan(near, 1, num=BATCH)
    ours, theirs = (views(each, drawn, GROUP, torch.bfloat16) for each in (near, far))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_selection_takes_its_own_bytes_there(tier: Tier) -> None:
    few = store().select(torch.tensor([4, 0, 2, 3]))
    there = place(few, CUDA, tier)
    assert there.pixels.numel() == few.num_bytes and there.readable
    for row in range(4):
        assert torch.equal(there.image(row).cpu(), few.image(row))


def test_images_that_stay_mapped_are_looked_at_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "CROPS_AT_ONCE", 16)
    photos = store(37)
    mapped = photos.tables_to(CUDA)
    assert not mapped.readable and photos.to(CUDA).readable
    looked, direct = (
        evaluate.outputs(torch.nn.Flatten(), each, resolution=17, dtype=torch.float32)
        for each in (mapped, photos.to(CUDA))
    )
    assert len(looked) == 37 and torch.equal(looked, direct)
