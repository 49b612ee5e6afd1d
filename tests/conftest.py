"""Fixtures every test file shares."""

import os
import ssl
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Kernels are interpreted where there is no GPU; Triton reads this when a kernel is defined.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# cuBLAS reads it once, when it is first used: tests of --exact may come later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch
from interpreted import quicken
from PIL import Image
from webserver import Site, serving

from fastidmm.backbones.torchvision_ops import make_torchvision_importable

make_torchvision_importable()  # before any test file imports it
quicken()

MakePhotos = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads that share two cores with others are slower than one, and noisier."""
    torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FASTIDMM_HOME, and a working directory of its own for ./runs."""
    folder = tmp_path / "home"
    monkeypatch.setenv("FASTIDMM_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A web server on this machine, and no proxy before it."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    # Its certificates take longer to read than a test does.
    monkeypatch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
    with serving() as site:
        yield site


def make_photos(folder: Path, *, per_class: int, classes: int = 2, side: int = 24) -> Path:
    """Small PNGs in CLASS/ folders: each class has a colour, each photograph its own pattern."""
    chance = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for number in range(per_class):
            high, wide = side + number % 5, side + number % 3
            pixels = chance.integers(0, 120, (high, wide, 3), dtype=np.uint8)
            pixels[:, :, label % 3] += 100
            Image.fromarray(pixels).save(place / f"{number:03d}.png")
    return folder


@pytest.fixture
def photos() -> MakePhotos:
    """The function that makes them."""
    return make_photos


def prepare_toy(folder: Path) -> str:
    """A prepared dataset of 20 training and 8 test photographs in 2 classes, of a folder."""
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    make_photos(folder / "photos" / "train", per_class=10)
    make_photos(folder / "photos" / "test", per_class=4)
    prepare(Folder().open(from_=folder / "photos", seed=0), "toy", workers=0, quiet=True)
    return "toy"


@pytest.fixture
def toy(home: Path, tmp_path: Path) -> str:
    """A prepared dataset of 20 training and 8 test photographs in 2 classes."""
    return prepare_toy(tmp_path)


@pytest.fixture
def bare(home: Path, tmp_path: Path) -> str:
    """A prepared dataset of 20 photographs without labels."""
    from fastidmm.datasets.folder import Folder
    from fastidmm.preparing.prepare import prepare

    place = make_photos(tmp_path / "bare", per_class=20, classes=1)
    (place / "class0").rename(tmp_path / "flat")
    prepare(Folder().open(from_=tmp_path / "flat", seed=0), "bare", workers=0, quiet=True)
    return "bare"
