"""Milliseconds to make all views of a batch from pixels on the device, beside what others do.

    fastidmm bench views [--size 112] [--images 256] [--json FILE]

The views of IDMM's pretraining: two large crops and four small ones of each image, jitter, gray,
blur, normalise, CutMix. `kornia` and `torchvision` are their own chains for that, on the same
device, from a batch of decoded pictures; both are given less to do: no CutMix, and Kornia draws one
order of the colours for a batch. `captured` is a training step's way. Repeats are interleaved, so
that a machine that slows down does so for all.
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
from fastidmm.bench.figures import Rows, measured, result
from fastidmm.bench.made import views_of_idmm
from fastidmm.chance import Counters
from fastidmm.kernels.views import views
from fastidmm.machine import name_of, synchronize
from fastidmm.plan import GroupPlan, draw
from fastidmm.store import Store

HEIGHT, WIDTH = 500, 667
WARM_UP = 2  # turns that are not counted
SLOW = 1000.0  # milliseconds


def measure(
    device: torch.device,
    *,
    quick: bool = False,
    size: int = 112,
    num_images: int | None = None,
    repeats: int | None = None,
) -> dict[str, Any]:
    """Time every way there is on `device`; milliseconds of a batch."""
    num_images = num_images or (256 if device.type == "cuda" else 8)
    repeats = repeats or (4 if quick else 10)
    groups = views_of_idmm(size, 2).views
    store = _photographs(num_images, device)
    plans = _plans(store, groups)
    arms = _arms(store, groups, plans)
    milliseconds: dict[str, list[float]] = {name: [] for name in arms}
    slow: set[str] = set()  # seconds a turn: without a second to warm up, and two tell
    for repeat in range(WARM_UP + repeats):
        for name, arm in arms.items():
            if quick and name in slow and repeat not in (WARM_UP, WARM_UP + 1):
                continue
            spent = _milliseconds(arm, device)
            if spent > SLOW:
                slow.add(name)
            if repeat >= WARM_UP:
                milliseconds[name].append(spent)
    base = median(milliseconds["fastidmm"])
    rows: Rows = {
        name: {"status": "ok", "milliseconds": measured(spent), "times": median(spent) / base}
        for name, spent in milliseconds.items()
    }
    if "kornia" not in rows:
        rows["kornia"] = {"status": "missing: kornia is not installed: pip install kornia"}
    crops = num_images * sum(group.count for group in groups)
    apart = _difference(store, groups, plans)
    return result(
        "views",
        f"{crops:,} crops of {size} px from {HEIGHT} x {WIDTH} px, {name_of(device)}",
        {"views": rows},
        settings={"size": size, "images": num_images, "crops": crops, "repeats": repeats,
                  "mean_difference": apart},
        notes=[f"views differ from the plain renderer's by {apart:.3f}/255 on average"],
    )  # fmt: skip


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
    if store.device.type == "cuda":
        arms["captured"] = _captured(arms["fastidmm"])
    batch = store.pixels.view(len(store), HEIGHT, WIDTH, 3).permute(0, 3, 1, 2)
    if find_spec("kornia"):
        chains = [_kornia(group) for group in groups]

        def by_kornia() -> list[Tensor]:
            images = batch.float() / 255
            return [
                chain(images).to(half)
                for chain, group in zip(chains, groups, strict=True)
                for _ in range(group.count)
            ]

        arms["kornia"] = by_kornia
    transforms = [_torchvision(group) for group in groups]
    arms["torchvision"] = lambda: [
        torch.stack([transform(image) for image in batch]).to(half)
        for transform, group in zip(transforms, groups, strict=True)
        for _ in range(group.count)
    ]
    return arms


def _captured(arm: Callable[[], object]) -> Callable[[], object]:
    """The same as one CUDA graph, which is how a step has it: no launch waits for the host."""
    arm()  # programs are compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


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
    synchronize(device)
    began = time.perf_counter()
    arm()
    synchronize(device)
    return 1000 * (time.perf_counter() - began)


def _difference(store: Store, groups: list[ViewGroup], plans: tuple[GroupPlan, ...]) -> float:
    """Mean difference from the plain renderer, in 1/255 of the full range."""
    found = []
    for plan, group in zip(plans, groups, strict=True):
        spread = torch.tensor(group.std, device=store.pixels.device).view(3, 1, 1)
        apart = views(store, plan, group, torch.float32) - render(store, plan, group)
        found.append(float((apart * spread).abs().mean()) * 255)
    return sum(found) / len(found)
