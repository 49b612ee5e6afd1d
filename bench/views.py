"""Milliseconds to make all views of a batch from pixels on the device, beside what others do.

    fastidmm bench views [--size 112] [--images 256] [--json]

The views of IDMM's pretraining: two large crops and four small ones of each image, jitter, gray,
blur, normalise, CutMix. `kornia` and `torchvision` are their own chains for that, on the same
device, from a batch of decoded pictures; both are given less to do: no CutMix, and Kornia draws one
order of the colours for a batch. Repeats are interleaved, so that a machine that slows down does so
for all.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastidmm.augment import render
from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels.views import views
from fastidmm.machine import name_of
from fastidmm.methods.idmm import IDMM, IDMMOptions
from fastidmm.plan import GroupPlan, draw
from fastidmm.store import Store

HEIGHT, WIDTH = 500, 667


def measure(
    device: torch.device, *, size: int, num_images: int, repeats: int, warm: int = 2
) -> dict[str, Any]:
    """Time every way there is on `device`; milliseconds of a batch, as measured."""
    groups = _groups(size)
    store = _photographs(num_images, device)
    plans = _plans(store, groups)
    arms = _arms(store, groups, plans)
    milliseconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(warm + repeats):
        for name, arm in arms.items():
            spent = _milliseconds(arm, device)
            if repeat >= warm:
                milliseconds[name].append(round(spent, 3))
    return {
        "device": name_of(device),
        "torch": torch.__version__,
        "size": size,
        "crops": num_images * sum(group.count for group in groups),
        "source": [HEIGHT, WIDTH],
        "mean_difference": _difference(store, groups, plans),
        "results": [{"name": name, "milliseconds": spent} for name, spent in milliseconds.items()],
    }


def text(told: dict[str, Any]) -> str:
    """A measurement as a table: median, least and most, and how many times the first."""
    high, wide = told["source"]
    lines = [
        f"{told['crops']:,} crops of {told['size']} px from {high} x {wide} px, {told['device']}",
        f"views differ from the plain renderer's by {told['mean_difference']:.3f}/255 on average",
        f"{'':14}{'ms':>10}  {'(least to most)':22}{'times':>6}",
    ]
    base = median(told["results"][0]["milliseconds"])
    for result in told["results"]:
        spent = result["milliseconds"]
        spread = f"({min(spent):,.2f} to {max(spent):,.2f})"
        middle = median(spent)
        lines.append(f"{result['name']:14}{middle:10,.2f}  {spread:22}{middle / base:6.2f}")
    return "\n".join(lines)


def _groups(size: int) -> list[ViewGroup]:
    backbone = nn.Identity()
    backbone.num_features = 1  # type: ignore[assignment]
    return IDMM(backbone, IDMMOptions(), resolution=size, num_rows=2).views


def _photographs(num: int, device: torch.device) -> Store:
    """Noise of one size, since that is what the others' batches need."""
    chance = torch.Generator().manual_seed(0)
    bytes_each = HEIGHT * WIDTH * 3
    pixels = torch.randint(0, 256, (num * bytes_each,), generator=chance, dtype=torch.uint8)
    high, wide = (torch.full((num,), side, dtype=torch.int32) for side in (HEIGHT, WIDTH))
    offset, label = torch.arange(num) * bytes_each, torch.zeros(num, dtype=torch.int64)
    return Store(pixels, offset, high, wide, label, ("noise",), "noise").to(device)


def _plans(store: Store, groups: list[ViewGroup]) -> tuple[GroupPlan, ...]:
    sizes = store.height, store.width
    return draw(sizes, groups, Counters(0), step=0, batch_size=len(store), cutmix_groups=4).groups


def _arms(
    store: Store, groups: list[ViewGroup], plans: tuple[GroupPlan, ...]
) -> dict[str, Callable[[], object]]:
    """Every way to make the views, the product's own first."""
    half = torch.bfloat16
    pairs = list(zip(plans, groups, strict=True))
    arms: dict[str, Callable[[], object]] = {
        "fastidmm": lambda: [views(store, plan, group, half) for plan, group in pairs],
        "with its plan": lambda: [
            views(store, plan, group, half)
            for plan, group in zip(_plans(store, groups), groups, strict=True)
        ],
        "plain renderer": lambda: [render(store, plan, group) for plan, group in pairs],
    }
    batch = store.pixels.view(len(store), HEIGHT, WIDTH, 3).permute(0, 3, 1, 2)
    if find_spec("kornia"):
        chains = [_kornia(group) for group in groups]
        arms["kornia"] = lambda: [
            chain(batch.float() / 255).to(half)
            for chain, group in zip(chains, groups, strict=True)
            for _ in range(group.count)
        ]
    transforms = [_torchvision(group) for group in groups]
    arms["torchvision"] = lambda: [
        torch.stack([transform(image) for image in batch]).to(half)
        for transform, group in zip(transforms, groups, strict=True)
        for _ in range(group.count)
    ]
    return arms


def _kornia(group: ViewGroup) -> nn.Module:
    """Kornia's chain for a group, each image of a batch with its own numbers."""
    from kornia import augmentation as k

    taps = 2 * round(4 * group.sigma[1]) + 1
    side = (group.size, group.size)
    chain: nn.Module = k.AugmentationSequential(
        k.RandomResizedCrop(side, scale=group.scale, ratio=group.ratio, cropping_mode="resample"),
        k.RandomHorizontalFlip(p=group.flip),
        k.ColorJitter(
            group.brightness, group.contrast, group.saturation, group.hue, p=group.jitter
        ),
        k.RandomGrayscale(p=group.gray),
        k.RandomGaussianBlur((taps, taps), group.sigma, p=group.blur),
        k.Normalize(torch.tensor(group.mean), torch.tensor(group.std)),
    )
    return chain


def _torchvision(group: ViewGroup) -> Callable[[Tensor], Tensor]:
    """torchvision's chain for a group, image by image as its numbers are."""
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    from torchvision.transforms import v2

    taps = 2 * round(4 * group.sigma[1]) + 1
    jitter = v2.ColorJitter(group.brightness, group.contrast, group.saturation, group.hue)
    chain: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(group.size, group.scale, group.ratio, antialias=True),
            v2.RandomHorizontalFlip(group.flip),
            v2.RandomApply([jitter], group.jitter),
            v2.RandomGrayscale(group.gray),
            v2.RandomApply([v2.GaussianBlur(taps, group.sigma)], group.blur),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(group.mean, group.std),
        ]
    )
    return chain


def _milliseconds(arm: Callable[[], object], device: torch.device) -> float:
    """Of one call, all its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    arm()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def _difference(store: Store, groups: list[ViewGroup], plans: tuple[GroupPlan, ...]) -> float:
    """Mean difference from the plain renderer, in 1/255 of the full range."""
    found = []
    for plan, group in zip(plans, groups, strict=True):
        spread = torch.tensor(group.std, device=store.pixels.device).view(3, 1, 1)
        apart = views(store, plan, group, torch.float32) - render(store, plan, group)
        found.append(float((apart * spread).abs().mean()) * 255)
    return sum(found) / len(found)
