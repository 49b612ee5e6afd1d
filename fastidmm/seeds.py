"""What several seeds tell of one setting, and of two."""

from collections.abc import Sequence
from statistics import mean, stdev, variance

LEVEL = 0.05  # two-sided


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of a mean of two or more values."""
    from scipy.special import stdtrit

    num = len(values)
    half: float = stdtrit(num - 1, 1 - LEVEL / 2) * stdev(values) / num**0.5
    return float(half)  # scipy's is NumPy's


def interval(values: Sequence[float]) -> tuple[float, float]:
    """That interval of a share."""
    half = half_width(values)
    return max(0.0, mean(values) - half), min(1.0, mean(values) + half)


def differ(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Whether two settings differ by Welch's t-test at 5 %; None: there is no spread to tell by.

    Where one has a single seed, the other's spread stands for both (Student's test).
    """
    from scipy.special import stdtr

    spreads = [(variance(values), len(values)) for values in (one, other) if len(values) > 1]
    if not any(spread for spread, _ in spreads):
        return None
    if len(spreads) == 2:
        squares = [spread / num for spread, num in spreads]
        freedom = sum(squares) ** 2 / sum(
            square**2 / (num - 1) for square, (_, num) in zip(squares, spreads, strict=True)
        )
    else:
        ((spread, num),) = spreads
        squares, freedom = [spread, spread / num], num - 1.0
    t = abs(mean(one) - mean(other)) / sum(squares) ** 0.5
    return bool(2 * stdtr(freedom, -t) < LEVEL)
