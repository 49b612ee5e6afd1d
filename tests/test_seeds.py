"""Means over seeds: Student's interval, and which settings differ."""

import pytest
from scipy import stats

from fastidmm import seeds


@pytest.mark.parametrize(
    ("values", "t"),
    # From printed tables of Student's t, two-sided 5 %, for 1, 2, 4 and 15 degrees of freedom.
    [([0.4, 0.6], 12.706), ([0.4, 0.5, 0.6], 4.303), ([0.1, 0.2] * 2 + [0.3], 2.776),
     ([0.25, 0.75] * 8, 2.131)],
)  # fmt: skip
def test_an_interval_is_student_s(values: list[float], t: float) -> None:
    num, middle = len(values), sum(values) / len(values)
    deviation = (sum((v - middle) ** 2 for v in values) / (num - 1)) ** 0.5
    assert seeds.half_width(values) == pytest.approx(t * deviation / num**0.5, rel=3e-4)
    low, high = seeds.interval(values)
    half = t * deviation / num**0.5
    assert (low, high) == pytest.approx((max(0, middle - half), min(1, middle + half)), rel=3e-4)


def test_an_interval_stays_a_share() -> None:
    assert seeds.interval([0.1, 0.9]) == (0, 1)


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")  # scipy's, of what is alike
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([0.40, 0.50, 0.60], [0.62, 0.66, 0.70]),  # p = 0.094
        ([0.40, 0.42, 0.44], [0.45, 0.47, 0.49]),  # p = 0.038
        ([0.40, 0.42, 0.44], [0.44, 0.46, 0.48]),  # p = 0.070
        ([0.50, 0.50, 0.50], [0.52, 0.53, 0.54]),  # all of one alike: p = 0.035
        ([0.30, 0.70], [0.71, 0.72, 0.73, 0.74]),
        ([0.5, 0.6, 0.7, 0.8, 0.9], [0.60, 0.61]),
    ],
)
def test_settings_differ_by_welch_s_test(one: list[float], other: list[float]) -> None:
    claimed = bool(stats.ttest_ind(one, other, equal_var=False).pvalue < 0.05)
    assert seeds.differ(one, other) is claimed and seeds.differ(other, one) is claimed


def test_unequal_numbers_of_seeds_are_not_pooled() -> None:
    """Student's test of a common spread would claim what Welch's does not."""
    one, other = [0.2, 0.8], [0.9, 0.901, 0.902, 0.899, 0.898, 0.9, 0.901, 0.9]
    pooled, welch = (stats.ttest_ind(one, other, equal_var=e).pvalue for e in (True, False))
    assert pooled < 0.05 < welch
    assert seeds.differ(one, other) is False


@pytest.mark.parametrize(("single", "claimed"), [(0.98, False), (1.0, True)])
def test_one_seed_is_set_against_the_spread_of_the_others(single: float, claimed: bool) -> None:
    """Another value of 0.4, 0.5 and 0.6 is within 4.303 x 0.1 x sqrt(4/3) = 0.497 of 0.5."""
    assert seeds.differ([0.4, 0.5, 0.6], [single]) is claimed
    assert seeds.differ([single], [0.4, 0.5, 0.6]) is claimed


def test_without_spread_seeds_tell_nothing() -> None:
    assert seeds.differ([0.4], [0.9]) is None
    assert seeds.differ([0.4, 0.4], [0.9, 0.9]) is None and seeds.differ([0.4, 0.4], [0.9]) is None
