"""Figures as people read them."""

from __future__ import annotations

_BAR = 10


def size(nbytes: float) -> str:
    """In units of 2^10."""
    for unit, limit in (("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def share(part: float, whole: float) -> str:
    """As a percentage; "-" of nothing."""
    return f"{part / whole:.1%}" if whole else "-"


def bar(part: float) -> str:
    """A share of 1, drawn."""
    full = round(min(part, 1.0) * _BAR)
    return "#" * full + "." * (_BAR - full)
