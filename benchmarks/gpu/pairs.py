"""What one pair says of another: ratios, paired, with an interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Student's t, two-sided 95 %, by degrees of freedom: scipy would be a dependency for sixteen numbers.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lower, upper) of the 95 % interval of the mean. One value has no interval: it is its own."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean, mean
    half = _T[min(len(values) - 2, len(_T) - 1)] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Of each pair."""
    return [x / y for x, y in zip(a, b, strict=True)]


def verdict(values: Sequence[float], mark: float, at_most: bool = True) -> str:
    """'met' when the bound of the interval meets the mark, 'missed' when the other one misses it, else not resolved."""
    _, low, high = interval(values)
    best, worst = (low, high) if at_most else (-high, -low)
    mark = mark if at_most else -mark
    if worst <= mark:
        return "met"
    return "missed" if best > mark else "not resolved"


def shown(values: Sequence[float], digits: int = 3) -> str:
    """mean [lower, upper]."""
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*interval(values), d=digits)
