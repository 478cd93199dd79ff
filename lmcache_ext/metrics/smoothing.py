"""One number for a rate that is measured again and again."""

from __future__ import annotations

_WEIGHT = 0.3  # of the newest measurement


def smoothed(known: float, newest: float) -> float:
    """What to go by from now on. `known`: what was gone by so far, 0 for nothing yet."""
    return (1 - _WEIGHT) * known + _WEIGHT * newest if known else newest
