"""The kernels of `draws` and `words` in Triton's interpreter: the plan's numbers, to the bit."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from fastidmm.batch import ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels import draws as kernel
from fastidmm.kernels import words

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, tests/gpu/ compares whole plans"
)
GROUP = ViewGroup(
    count=2, size=37, scale=(0.05, 0.4), jitter=0.8, brightness=(0.2, 1.8), contrast=(0.3, 1.7),
    saturation=(0.4, 1.6), hue=(-0.2, 0.2), gray=0.2, blur=0.5, sigma=(0.1, 2.0), solarize=0.3,
    randaugment=2,
)  # fmt: skip


def sizes(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heights and widths, among them strips that no try fits."""
    chance = torch.Generator().manual_seed(0)
    high = torch.randint(1, 900, (num,), generator=chance).int()
    wide = torch.randint(1, 900, (num,), generator=chance).int()
    high[::5] = 3
    wide[1::5] = 2
    return high, wide


@pytest.mark.parametrize(
    "group",
    [
        GROUP,
        replace(GROUP, randaugment=0, scale=(0.14, 1.0), flip=1.0, gray=0.0),
        replace(GROUP, randaugment=3, ratio=(0.5, 1.5), size=224, blur=1.0),
        replace(GROUP, scale=(1e-9, 2e-9)),  # no try fits: the central crop of every image
    ],
)
@pytest.mark.parametrize("num", [1, 130])
def test_every_number_is_the_plans(group: ViewGroup, num: int) -> None:
    """Also with the largest seed there is, a later attempt and epoch, and rows in any order."""
    high, wide = sizes(num)
    rows = torch.arange(num).flip(0).repeat(2)
    views = torch.arange(2).repeat_interleave(num)
    for seed, attempt, epoch in ((0, 0, 0), (2**32 - 1, 2**23, 2**31 - 1), (2**31, 3, 799)):
        given = (group, rows, views, (high, wide), Counters(seed, attempt), epoch)
        ours, theirs = kernel.fused(*given), kernel.reference(*given)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
            assert torch.equal(ours[name], expected), name
    if num > 1:
        full = ours["window"][:, 2:] - ours["window"][:, :2]
        assert bool((full[:, 0] == high[rows]).any())  # a strip, taken by its middle


@pytest.mark.parametrize("key", [(0, 0), (2**32 - 1, 2**32 - 1), (2**31, 5)])
def test_words_are_philoxs(key: tuple[int, int]) -> None:
    """Parts of one and of two dimensions, whole numbers beyond 31 bits, a tensor without any."""
    row = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 7, 5 * 2**32 + 3])
    some = torch.arange(300)
    for counter in (
        (3, row, 0, 0),
        (2**32 - 1, 1, 2**31, row),
        (row, row.flip(0), 2**31 - 1, row),
        (799, some[:, None], row, 1),
        (torch.tensor(12), some[:, None, None], 2, torch.arange(3)),
    ):
        assert torch.equal(words.fused(counter, key), words.reference(counter, key))
    none = torch.zeros(0, dtype=torch.int64)
    assert words.fused((0, none, 0, 0), key).shape == (0, 4)


def test_no_crops_are_no_launch() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    found = kernel.fused(GROUP, none, none, sizes(3), Counters(0), 0)
    assert found["window"].shape == (0, 4) and found["spot"].shape == (0, 2, 2)
