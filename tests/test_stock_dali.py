"""The pipeline that DALI is compared by has IDMM's views, every file once an epoch."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastidmm.batch import ViewGroup
from fastidmm.bench.stock_dali import stock

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'fastidmm[dali]'")

NUM, BATCH = 17, 7
# DALI draws from no range of one value; these colours stay as they are, by less than a level.
GROUP = ViewGroup(
    count=2, size=16, scale=(0.14, 1.0), brightness=(0.2, 1.8), contrast=(0.999, 1.001),
    saturation=(0.999, 1.001), hue=(-1e-4, 1e-4),
)  # fmt: skip
LEVELS = [(40 + 12 * n, 250 - 13 * n, 7 * n) for n in range(NUM)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of one colour each, and of several sizes."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{n}.png" for n in range(NUM)]
    for n, path in enumerate(paths):
        pixels = np.full((30 + 5 * n % 17, 28 + 7 * n % 19, 3), LEVELS[n], dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def batches(
    files: list[Path], groups: list[ViewGroup], num: int, *, size: int = BATCH, seed: int = 3
) -> list[list[Tensor]]:
    return list(islice(stock(files, groups, size, torch.device("cpu"), 2, seed), num))


def levels(views: Tensor, group: ViewGroup) -> Tensor:
    """Normalised views (B, 3, S, S) as levels of 255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (group.mean, group.std))
    return (views * std + mean) * 255


def test_every_file_comes_once_an_epoch_and_is_the_one_its_index_names(files: list[Path]) -> None:
    small = replace(GROUP, count=1, size=11, scale=(0.05, 0.4), std=(0.5, 0.25, 0.125))
    groups = [GROUP, small]
    found = batches(files, groups, 7)
    sizes = [7, 7, 3, 7, 7, 3, 7]
    for batch, num in zip(found, sizes, strict=True):
        assert [tuple(view.shape[1:]) for view in batch] == [(3, 16, 16)] * 2 + [(3, 11, 11), ()]
        assert {len(part) for part in batch} == {num}
        assert [part.dtype for part in batch] == [torch.float32] * 3 + [torch.int64]
        wanted = torch.tensor(LEVELS)[batch[-1]][:, :, None, None].float()
        for view, group in zip(batch, (groups[0], groups[0], groups[1]), strict=False):
            assert float((levels(view, group) - wanted).abs().max()) < 0.01
    epochs = [torch.cat([batch[-1] for batch in found[i : i + 3]]).tolist() for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(NUM))
    assert epochs[0] != epochs[1] != list(range(NUM)) != epochs[0]


def test_chances_are_the_groups(tmp_path: Path) -> None:
    """Gray, mirrored, blurred and twisted in their shares, of 400 views."""
    ramp = np.zeros((32, 32, 3), dtype=np.uint8)
    ramp[:, 16:] = (200, 120, 60)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    chances = {"gray": 0.2, "flip": 0.5, "blur": 0.6, "jitter": 0.8}
    group = replace(
        GROUP, size=32, scale=(0.99, 1.0), ratio=(0.99, 1.01), brightness=(0.4, 0.6),
        sigma=(1.9, 2.0), gray=chances["gray"], flip=chances["flip"], blur=chances["blur"],
        jitter=chances["jitter"],
    )  # fmt: skip
    made = batches([tmp_path / "ramp.png"] * 100, [group], 2, size=100)
    views = torch.cat([torch.stack(b[:-1]) for b in made])
    pixels = levels(views.flatten(0, 1), group).round()
    left, right = pixels[:, :, 16, 0], pixels[:, :, 16, -1]
    bright = torch.maximum(left, right)
    is_gray = (bright.amax(1) - bright.amin(1)) <= 1
    told = {
        "gray": is_gray,
        "flip": left.sum(1) > right.sum(1),
        "blur": (pixels[:, 0, 16, 14:18].diff().abs() > 3).sum(1) > 1,
        "jitter": bright.sum(1) < 0.75 * torch.where(is_gray, 3 * 137, 380),
    }
    for name, chance in chances.items():
        deviation = (chance * (1 - chance) / len(pixels)) ** 0.5
        assert abs(float(told[name].float().mean()) - chance) < 4 * deviation, name


def test_values_stay_in_range_and_hue_turns(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "red.png")
    group = replace(GROUP, jitter=1.0, contrast=(0.2, 1.8), saturation=(0.2, 1.8), hue=(0.33, 0.34))
    views = torch.cat(
        [torch.cat(b[:-1]) for b in batches([tmp_path / "red.png"] * 50, [group], 1, size=50)]
    )
    pixels = levels(views, group)
    assert pixels.min() >= -0.01 and pixels.max() <= 255.01
    turned = pixels.mean((0, 2, 3))
    assert turned[1] > turned[0] + 20  # a third of a turn makes red green


def test_a_seed_repeats_itself(files: list[Path]) -> None:
    group = replace(GROUP, jitter=0.8)
    one, same, other = (batches(files, [group], 2, seed=seed) for seed in (3, 3, 4))
    for a, b in zip(one, same, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
