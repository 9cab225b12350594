"""Ratios of two timings that were taken in turns, with an interval that assumes nothing about the noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Median:
    """A median and an interval around it that holds the true one with at least 95 %.

    Attributes
    ----------
    value, low, high : float
    pairs : int
        How many values it was made of.
    """

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def median_of(values: Sequence[float]) -> Median:
    """Return the median with the interval of the sign test: the k-th smallest and k-th largest value, k as large as 95 % allow.

    Source: Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2. Fewer than six values never reach 95 %.

    Raises
    ------
    ValueError
        There are fewer than six values.
    """
    ordered, n = sorted(values), len(values)
    if n < 6:
        raise ValueError(f"{n} values are too few for a 95 % interval of a median; take at least 6")
    outside, k = 0.0, 0
    # 2 P(at most k of n fair coins) must stay at or below 5 %.
    while outside + comb(n, k) / 2 ** (n - 1) <= 0.05:
        outside += comb(n, k) / 2 ** (n - 1)
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Median(middle, ordered[k - 1], ordered[n - k], n)
