"""What is made up to measure with: photographs, pictures in memory, views without a model."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastidmm.methods.idmm import IDMM, IDMMOptions
from fastidmm.store import Store

QUALITY, NOISE = 90, 6.0  # together about 1/3 byte per pixel, as photographs of this size have


def photographs_in(folder: Path, num: int, *, width: int = 667, height: int = 500) -> Path:
    """Write made-up JPEGs of a photograph's bytes: smooth shapes under fine noise.

    110 kB each at 667 x 500 px, 64 kB at 500 x 375.
    """
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(num):
        coarse = chance.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = chance.normal(0, NOISE, (height, width, 1))
        pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=QUALITY)
    return folder


def noise(num: int, pictures: int) -> Store:
    """A store of noise of the Flowers' sizes and classes: 500 px high, 500 to 749 wide.

    `num` rows, which share `pictures` different pictures.
    """
    chance = torch.Generator().manual_seed(0)
    wide = torch.randint(500, 750, (pictures,), generator=chance).int()
    length = wide.long() * 500 * 3
    pixels = torch.randint(0, 256, (int(length.sum()),), generator=chance, dtype=torch.uint8)
    which = torch.arange(num) % pictures
    return Store(
        pixels=pixels,
        offset=(length.cumsum(0) - length)[which],
        height=torch.full((num,), 500, dtype=torch.int32),
        width=wide[which],
        label=torch.arange(num) % 102,
        class_names=tuple(map(str, range(102))),
        fingerprint="noise",
    )


def views_of_idmm(resolution: int, num_rows: int) -> IDMM:
    """IDMM around no backbone: a method that says which views it wants, and no more."""
    backbone = nn.Identity()
    backbone.num_features = 1  # type: ignore[assignment]
    return IDMM(backbone, IDMMOptions(), resolution=resolution, num_rows=num_rows, batch_size=1)


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    """Stores go to a folder of the measurement's own."""
    before = os.environ.get("FASTIDMM_HOME")
    os.environ["FASTIDMM_HOME"] = str(home)
    try:
        yield
    finally:
        del os.environ["FASTIDMM_HOME"]
        if before is not None:
            os.environ["FASTIDMM_HOME"] = before


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder of the measurement's own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fastidmm-bench-") as made:
        yield Path(made)
