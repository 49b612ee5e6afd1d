"""Words against the published vectors, and what is made of them against exact distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastidmm.chance import (
    WORD,
    Counters,
    Use,
    below,
    beta_table,
    between,
    happens,
    look_up,
    permutation,
    philox,
    ratio_table,
    rounds,
    uniform,
)

CPU = torch.device("cpu")
# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words_of(num: int, use: Use = Use.CROP, seed: int = 0, attempt: int = 0) -> Tensor:
    return philox((torch.arange(num), 3, 1, 4), Counters(seed, attempt).key(use))


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    for words in (philox, rounds):  # what a CPU is given, and the definition
        assert words(tuple(torch.tensor(c) for c in counter), key).tolist() == list(expected)
        for only in range(4):  # one tensor among whole numbers, in every place
            mixed = tuple(torch.tensor(c) if i == only else c for i, c in enumerate(counter))
            assert words(mixed, key).tolist() == list(expected)


def test_philox_broadcasts_and_wraps_its_counters() -> None:
    rows, blocks = torch.tensor([5, 9])[:, None], torch.arange(3)
    words = philox((1, rows, 2, blocks), (7, 8))
    assert words.shape == (2, 3, 4)
    for i, row in enumerate((5, 9)):
        for block in range(3):
            alone = philox((1, torch.tensor(row), 2, block), (7, 8))
            assert torch.equal(words[i, block], alone)
    wrapped = philox((1 + 2**32, rows, 2, blocks + 2**32), (7, 8))
    assert torch.equal(wrapped, words)


def test_words_are_32_bits_and_uniform() -> None:
    words = words_of(1 << 15)
    assert words.dtype == torch.int64 and int(words.min()) >= 0 and int(words.max()) <= WORD
    for column in range(4):
        for shift in (26, 13, 0):  # upper, middle and lowest six bits
            counts = ((words[:, column] >> shift) & 63).bincount(minlength=64)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ("use", words_of(4096, Use.MIX)),
        ("seed", words_of(4096, seed=1)),
        ("attempt", words_of(4096, attempt=1)),
        ("attempt, by a whole byte", words_of(4096, attempt=256)),
    ],
)
def test_draws_of_another_kind_share_nothing(change: str, other: Tensor) -> None:
    words = words_of(4096)
    assert int((words == other).sum()) <= 1, change
    for column in range(4):
        r = np.corrcoef(words[:, column].numpy(), other[:, column].numpy())[0, 1]
        assert abs(r) < 5 / math.sqrt(4096), change


def test_the_four_words_of_a_counter_are_independent() -> None:
    r = np.corrcoef(words_of(1 << 14).numpy().T) - np.eye(4)
    assert np.abs(r).max() < 5 / math.sqrt(1 << 14)


def test_no_two_uses_or_attempts_have_one_key() -> None:
    keys = {Counters(3, attempt).key(use) for attempt in range(300) for use in Use}
    assert len(keys) == 300 * len(Use)


@pytest.mark.parametrize("limit", [1, 2, 24, 12_345, 2**31 - 1])
def test_below_is_the_exact_product(limit: int) -> None:
    words = torch.cat((torch.tensor([0, 1, WORD - 1, WORD]), words_of(500).flatten()))
    expected = [word * limit // 2**32 for word in words.tolist()]
    assert below(words, limit).tolist() == expected
    assert below(words, torch.tensor(limit)).tolist() == expected
    assert expected[0] == 0 and expected[3] == limit - 1


def test_uniform_is_exact_and_never_one() -> None:
    words = torch.tensor([0, 1, 1 << 31, WORD])
    assert uniform(words).tolist() == [0.0, 2.0**-32, 0.5, 1 - 2.0**-32]
    assert between(words, -0.2, 0.2).tolist()[0] == -0.2
    assert float(between(words, 0.2, 1.8)[3]) < 1.8


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_happens_as_often_as_asked(probability: float) -> None:
    assert happens(torch.tensor([0, WORD]), probability).tolist() == [
        probability > 0,
        probability == 1,
    ]
    hits = happens(words_of(1 << 14).flatten(), probability)
    spread = math.sqrt(probability * (1 - probability) / hits.numel())
    assert abs(float(hits.double().mean()) - probability) <= 4.5 * spread


@pytest.mark.parametrize("num", [0, 1, 2, 1000])
def test_permutation_holds_every_position_once(num: int) -> None:
    order = permutation(words_of(num))
    assert sorted(order.tolist()) == list(range(num))
    assert num < 1000 or order.tolist() != list(range(num))


def test_permutations_are_uniform() -> None:
    words = words_of(4 * 4800).view(4800, 4, 4)
    counts: dict[tuple[int, ...], int] = {}
    for four in words:
        order = tuple(permutation(four).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_permutation_looks_at_both_words() -> None:
    words = torch.tensor([[7, 900, 0, 0], [7, 100, 0, 0], [6, WORD, 0, 0]])
    assert permutation(words).tolist() == [2, 1, 0]


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
def test_beta_table_holds_the_quantiles(alpha: float) -> None:
    table = beta_table(alpha, CPU).numpy()
    middles = (np.arange(2**16) + 0.5) / 2**16
    np.testing.assert_allclose(stats.beta(alpha, alpha).cdf(table), middles, atol=1e-10)
    if alpha == 0.5:  # the arcsine distribution, in closed form
        np.testing.assert_allclose(table, np.sin(np.pi / 2 * middles) ** 2, atol=1e-12)


def test_ratio_table_is_uniform_in_the_logarithm() -> None:
    logs = np.log(ratio_table(3 / 4, 4 / 3, CPU).numpy())
    ends = np.log(3 / 4), np.log(4 / 3)
    step = (ends[1] - ends[0]) / 2**16
    np.testing.assert_allclose(logs, ends[0] + step * (np.arange(2**16) + 0.5), atol=1e-14)


def test_look_up_uses_the_upper_bits() -> None:
    table = torch.arange(2**16)
    assert look_up(table, torch.tensor([0, 0xFFFF, 0x1FFFF, WORD])).tolist() == [0, 0, 1, 65535]
