"""The look of pictures, and the search for near ones, against brute force."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.fft import dctn
from synthetic import photograph

from fastidmm.preparing.lookalike import BANDS, NEAR, SIDE, look, nearest

PHOTOGRAPHS = [Image.fromarray(photograph(240 + 7 * n, 300 + 5 * n, n)) for n in range(12)]


def bits(one: int | None, other: int | None) -> int:
    assert one is not None and other is not None
    return (one ^ other).bit_count()


def test_a_look_is_the_signs_of_the_lowest_cosine_waves() -> None:
    image = PHOTOGRAPHS[0]
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    waves = dctn(np.asarray(small, np.float64), norm="ortho")
    lowest = waves[:8, :8].copy()
    lowest[0, 0] = waves[8, 0]
    truth = "".join("1" if wave > 0 else "0" for wave in lowest.flatten())
    assert look(image) == int(truth, 2)


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file)


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: image.resize((image.width // 2, image.height // 2)),
        lambda image: image.resize((128, 96), Image.Resampling.BICUBIC),
        recompressed,
        lambda image: ImageEnhance.Brightness(image).enhance(0.75),
        lambda image: image.point(lambda value: min(value + 20, 255)),
        lambda image: image.convert("L"),
    ],
    ids=["half", "small", "recompressed", "darker", "brighter", "gray"],
)
def test_the_same_photograph_is_known_again(changed) -> None:  # type: ignore[no-untyped-def]
    for image in PHOTOGRAPHS:
        assert bits(look(image), look(changed(image))) <= NEAR


def test_other_photographs_look_otherwise() -> None:
    looks = [look(image) for image in PHOTOGRAPHS]
    apart = [bits(a, b) for n, a in enumerate(looks) for b in looks[:n]]
    assert min(apart) > 2 * NEAR
    assert bits(looks[0], look(PHOTOGRAPHS[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > NEAR


@pytest.mark.parametrize("size", [(1, 1), (400, 3), (33, 64)])
def test_an_even_picture_has_no_look(size: tuple[int, int]) -> None:
    assert look(Image.new("RGB", size, (200, 30, 90))) is None


def brute_force(
    looks: NDArray[np.uint64], num_train: int, near: int
) -> tuple[list[int], list[int]]:
    rows, apart = [], []
    for row in range(len(looks)):
        found = [(bits(int(looks[k]), int(looks[row])), k) for k in range(min(row, num_train))]
        least = min(found, default=(99, -1))
        rows.append(least[1] if least[0] <= near else -1)
        apart.append(least[0] if least[0] <= near else 0)
    return rows, apart


@pytest.mark.parametrize("near", [0, 3, NEAR])
@pytest.mark.parametrize("num_train", [0, 1, 250, 400])
def test_the_search_misses_nothing(num_train: int, near: int) -> None:
    chance = np.random.default_rng(near)
    seeds = chance.integers(0, 1 << 63, 25, dtype=np.uint64)
    looks = seeds[chance.integers(0, 25, 400)]
    for _ in range(5):
        turned = np.uint64(1) << chance.integers(0, 64, 400, dtype=np.uint64)
        looks = looks ^ turned * chance.integers(0, 2, 400, dtype=np.uint64)
    rows, apart = nearest(looks, num_train, near)
    truth = brute_force(looks, num_train, near)
    assert (rows.tolist(), apart.tolist()) == truth
    assert num_train < 250 or sum(row >= 0 for row in truth[0]) > 0


def test_five_bits_are_found_wherever_they_are() -> None:
    """Two in each of two bands and one in the third, which may be any bit of it."""
    chance = np.random.default_rng(0)
    turned = []
    for low, width in BANDS:
        others = [first for first, _ in BANDS if first != low]
        rest = sum(1 << first | 2 << first for first in others)
        turned += [rest | 1 << bit for bit in range(low, low + width)]
    looks = chance.integers(0, 1 << 64, 64, dtype=np.uint64)
    pairs = np.concatenate([looks, looks ^ np.array(turned, np.uint64)])
    assert sorted(map(int.bit_count, turned)) == [5] * 64
    rows, apart = nearest(pairs, 128)
    assert rows.tolist() == [-1] * 64 + list(range(64))
    assert apart.tolist() == [0] * 64 + [5] * 64


def test_many_equal_looks_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = np.zeros(20_000, np.uint64)
    looks[10_000:] = 1
    rows, apart = nearest(looks, 15_000)
    assert rows[0] == -1 and (rows[1:10_000] == 0).all() and not apart[:10_000].any()
    assert (rows[10_000], apart[10_000]) == (0, 1)
    assert (rows[10_001:] == 10_000).all() and not apart[10_001:].any()


def test_small_chunks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(1)
    looks = chance.integers(0, 1 << 12, 300, dtype=np.uint64)
    truth = nearest(looks, 200)
    monkeypatch.setattr("fastidmm.preparing.lookalike.CHUNK", 7)
    assert all((a == b).all() for a, b in zip(truth, nearest(looks, 200), strict=True))


def test_none_at_all_and_more_than_the_bands_can_promise() -> None:
    rows, apart = nearest(np.zeros(0, np.uint64), 0)
    assert len(rows) == len(apart) == 0
    with pytest.raises(ValueError, match="near 6"):
        nearest(np.zeros(2, np.uint64), 2, 6)
