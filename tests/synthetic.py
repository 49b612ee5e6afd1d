"""Photographs made up for tests, the stores that hold them, and what trains on those."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastidmm.backbones.build import BackboneOptions, build_encoder
from fastidmm.batch import Method
from fastidmm.chance import Counters
from fastidmm.loaders.resident import Resident
from fastidmm.registry import find
from fastidmm.store import Store

Photograph = NDArray[np.uint8]
# Options of methods whose own heads are too large for a CPU.
SMALL: dict[str, dict[str, int]] = {
    "dino": {"out_dim": 48, "hidden": 64},
    "mocov3": {"hidden": 64},
}


def photograph(high: int, wide: int, seed: int = 0) -> Photograph:
    """Smooth waves, hard edges and noise: (high, wide, 3), from black to white."""
    random = np.random.default_rng([high, wide, seed])
    y, x = np.mgrid[0:high, 0:wide] / max(high, wide)
    tilt, phase = random.uniform(-3, 3, (2, 3)), random.uniform(0, 6, 3)
    waves = np.sin(y[..., None] * tilt[0] * 6 + x[..., None] * tilt[1] * 6 + phase)
    image = 128 + 60 * waves
    for _ in range(4):
        top, left = random.integers(0, high), random.integers(0, wide)
        image[top : top + high // 3 + 1, left : left + wide // 3 + 1] = random.uniform(-40, 295, 3)
    image += random.normal(0, 30, image.shape)
    pixels: Photograph = image.clip(0, 255).astype(np.uint8)
    return pixels


def store_of(images: list[Photograph], num_classes: int = 3) -> Store:
    """A store of these images; row r is of class r modulo the number of classes."""
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32)
    ends = torch.tensor([image.size for image in images]).cumsum(0)
    return Store(
        pixels=torch.cat([torch.from_numpy(image).flatten() for image in images]),
        offset=ends - torch.tensor([image.size for image in images]),
        height=sizes[:, 0],
        width=sizes[:, 1],
        label=torch.arange(len(images)) % num_classes,
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        fingerprint="synthetic",
    )


def small_store(num: int = 7) -> Store:
    """Photographs of several awkward sizes."""
    return store_of([photograph(20 + 7 * r % 31, 24 + 11 * r % 29, r) for r in range(num)])


def assembled(
    method: str,
    *,
    backbone: str = "vit_micro",
    num: int = 7,
    batch_size: int = 7,
    drop_path: float = 0.2,
) -> tuple[Method, Resident]:
    """A method over a backbone at 32 px, and the loader that feeds it."""
    store, counters = small_store(num), Counters(seed=1)
    options = BackboneOptions(drop_path=drop_path)
    encoder = build_encoder(backbone, options, resolution=32, counters=counters)
    kind = find("method", method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        built: Method = kind(
            encoder,
            kind.Options(**SMALL.get(method, {})),
            resolution=32,
            num_rows=len(store),
            num_classes=store.num_classes,
            batch_size=batch_size,
        )
    return built.train(), Resident(store, built, counters, batch_size=batch_size)
