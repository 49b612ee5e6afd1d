"""Photographs that look like others: a hash of what a picture shows, and the search for near ones.

The look of a picture is 64 bits: its luma, averaged to 32 by 32, is taken through a cosine
transform, and a bit says whether one of the 64 lowest coefficients is positive. The mean is left
out, so that brightness changes nothing and contrast little; scaling and recompressing hardly move
so low frequencies. Two pictures look alike when at most `NEAR` bits differ; `docs/decisions.md`
has the measurement. A mirrored, turned or cropped picture is not found.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
NEAR = 5  # bits
FLAT = 2.0  # gray levels: below this deviation a picture shows nothing to compare
BANDS = ((0, 22), (22, 21), (43, 21))  # first bit, bits
CHUNK = 1 << 22  # pairs compared at a time
FAR = np.int64(1) << 62

Looks = NDArray[np.uint64]
Rows = NDArray[np.int64]

_FREQUENCY, _PLACE = np.mgrid[0:9, 0:SIDE]
COSINES = np.cos(np.pi * (2 * _PLACE + 1) * _FREQUENCY / (2 * SIDE))


def look(image: Image.Image) -> int | None:
    """The 64 bits of a picture, or None where it is too even to be told from others."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    luma = np.asarray(small, np.float64)
    if luma.std() < FLAT:
        return None
    waves = COSINES @ luma @ COSINES.T
    lowest = waves[:8, :8].copy()
    lowest[0, 0] = waves[8, 0]  # instead of the mean
    return int.from_bytes(np.packbits(lowest > 0).tobytes())


def nearest(looks: Looks, num_train: int, near: int = NEAR) -> tuple[Rows, Rows]:
    """For each picture the most alike training picture before it, within `near` bits.

    `looks` (N,) holds the training pictures first. Returns (N,) rows, -1 where there is none, and
    (N,) bits that differ; of equally near pictures the earliest counts. No pair is missed: of
    three bands, at least one differs in a bit at most where the whole differs in up to five, and
    each picture meets all others with such a band.
    """
    if near > 2 * len(BANDS) - 1:
        raise ValueError(f"near {near} is more than the bands can promise")
    unique, which = np.unique(looks, return_inverse=True)
    first = np.full(len(unique), len(looks), np.int64)
    np.minimum.at(first, which[:num_train], np.arange(num_train))
    # Distance above and row below in one number, so that the least is the nearest and earliest.
    best = np.full(len(unique), FAR)
    for low, width in BANDS:
        keys = (unique >> np.uint64(low)).astype(np.int64) & ((1 << width) - 1)
        _join(unique, keys, width, first, best, near)
    rows = np.arange(len(looks))
    same = first[which] < rows
    found = np.where(same, first[which], best[which])
    none = ~same & (best[which] == FAR)
    return (
        np.where(none, -1, found & ((1 << 40) - 1)),
        np.where(none | same, 0, found >> 40),
    )


def _join(unique: Looks, keys: Rows, width: int, first: Rows, best: Rows, near: int) -> None:
    """Compare all looks of which this band is equal or differs in one bit; keep the nearest."""
    order = np.argsort(keys, kind="stable")
    values, places, counts = np.unique(keys[order], return_index=True, return_counts=True)
    # Of millions of keys few are there: pages that none is on are never touched.
    begins, nums = np.zeros((2, 1 << width), np.int64)
    begins[values], nums[values] = places, counts
    for turned in (0, *(1 << bit for bit in range(width))):
        others = keys ^ turned
        sizes = nums[others]
        ends = np.cumsum(sizes)
        start = 0
        while start < len(unique):
            before = ends[start - 1] if start else 0
            stop = max(int(np.searchsorted(ends, before + CHUNK, "right")), start + 1)
            left = np.repeat(np.arange(start, stop), sizes[start:stop])
            place = np.arange(len(left)) - np.repeat(
                ends[start:stop] - sizes[start:stop] - before, sizes[start:stop]
            )
            right = order[begins[others[left]] + place]
            bits = np.bitwise_count(unique[left] ^ unique[right]).astype(np.int64)
            kept = (bits <= near) & (first[right] < first[left])
            left, right, bits = left[kept], right[kept], bits[kept]
            np.minimum.at(best, left, (bits << 40) | first[right])
            start = stop
