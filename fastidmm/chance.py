"""Random numbers as a pure function of counters: Philox-4x32-10 and what is made of its words.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
Words are int64 tensors in [0, 2**32), equal on every device.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum, unique
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastidmm.kernels.words import words

WORD = 0xFFFFFFFF
TABLE_BITS = 16


@unique
class Use(IntEnum):
    """What a number is drawn for; different uses never share a number."""

    ORDER = 0
    CROP = 1
    MIX = 2
    PARTNER = 3
    DROP = 4
    SUBSET = 5
    OPERATION = 6
    HOLDOUT = 7


def _multiply(a: int, b: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """High and low word of the 64-bit product; halves keep int64 from overflowing."""
    high = a * (b >> 16)
    low = a * (b & 0xFFFF)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """Four words for each counter: parts that broadcast to (...), one a tensor, give (..., 4).

    Whole numbers stay on the host: made into tensors, each would cost a copy to the device.
    """
    return words(counter, key)


def rounds(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> Tensor:
    """The definition of `philox`, in operations that every device has."""
    c0, c1, c2, c3 = (part & WORD for part in counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    found = [word for word in (c0, c1, c2, c3) if isinstance(word, Tensor)]
    # The sum's shape is the one they all broadcast to.
    shape = sum(found[1:], found[0])
    return torch.stack([word.expand_as(shape) for word in found], dim=-1)


@dataclass(slots=True)
class Counters:
    """Where a run stands, for everything that draws; one object is shared by all who do."""

    seed: int
    attempt: int = 0
    step: Tensor | int = 0
    place: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # place: (crops,) int64, each crop's position in the global batch of this forward pass

    def key(self, use: Use) -> tuple[int, int]:
        """Philox's key for one use."""
        return self.seed & WORD, ((self.attempt << 8) | use) & WORD


def uniform(words: Tensor) -> Tensor:
    """Words to float64 in [0, 1), exactly."""
    return words.to(torch.float64) * 2.0**-32


def between(words: Tensor, low: float, high: float) -> Tensor:
    """Words to float64 in [low, high)."""
    return uniform(words) * (high - low) + low


def below(words: Tensor, limit: Tensor | int) -> Tensor:
    """Words to integers in [0, limit), limit < 2**31."""
    return (words * limit) >> 32


def happens(words: Tensor, probability: float) -> Tensor:
    """Words to booleans, true with the probability given."""
    return words < limit(probability)


def limit(probability: float) -> int:
    """Words below it are that probable."""
    return round(probability * 2**32)


def permutation(words: Tensor) -> Tensor:
    """A permutation of n positions from (n, 4) words; equal on every device."""
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


def _middles() -> NDArray[np.float64]:
    middles: NDArray[np.float64] = (
        np.arange(2**TABLE_BITS, dtype=np.float64) + 0.5
    ) / 2**TABLE_BITS
    return middles


@cache
def ratio_table(low: float, high: float, device: torch.device) -> Tensor:
    """Aspect ratios, uniform in their logarithm: (2**16,) float64.

    Made once on the host, since exp is not equal to the bit between devices.
    """
    logs = math.log(low) + (math.log(high) - math.log(low)) * _middles()
    return torch.from_numpy(np.exp(logs)).to(device)


@cache
def beta_table(alpha: float, device: torch.device) -> Tensor:
    """Quantiles of Beta(alpha, alpha): (2**16,) float64."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, _middles())).to(device)


def look_up(table: Tensor, words: Tensor) -> Tensor:
    """The table's entry that each word's upper bits choose."""
    return table[words >> (32 - TABLE_BITS)]
